# SPDX-License-Identifier: Apache-2.0
"""Our transformer in chunks beside diffusers' WanTransformer3DModel: time, memory, difference.

    pw bench dit-peers --out bench/results/NAME.json

A stage of a few steps from noise to latent, two passes a step, on this CPU: the same random
weights, noise and texts in fp32, the same sampler, a process for every sample, the contenders in
turns. diffusers supports neither adapter nor step size, so both run the plain Wan transformer: the
same blocks as in the high-res stage, under the draft's interface. Its passes are those of its
WanPipeline: texts padded to 512 rows, and one timestep, or (`expand_timesteps`, the setting of
Wan2.2-TI2V-5B) one for every token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.e2e.diffusers_networks import wan_transformer
from pw_bench.measure.environment import envelope, identify, usual_operations
from pw_bench.peers.subprocess_ab import Run, figures_of, ratios_of, run_in_turns, serve
from pw_bench.result_sections import OutputDifference
from pw_bench.results import Result
from pw_engines.engine import relative_l2
from pw_runtime.checkpoint import keymaps
from pw_runtime.errors import BadRequest
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.models import WanDiT
from pw_runtime.sampling.schedule import make_schedule, time_input
from pw_runtime.sampling.solver import sample
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.types import VAE_STRIDE, Compat, DitConfig, StageConfig, TextContext

DIFFUSERS: Final = "diffusers"
PER_TOKEN: Final = "diffusers expand_timesteps"
OURS: Final = "ours"
HEAD_DIM = 128
TEXT_ROWS = 512  # max_sequence_length of WanPipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class DitWork:
    """Sizes of the network, of the clip in pixels and frames, and of the computation.

    Raises BadRequest for sizes that the network cannot have.
    """

    dim: int
    layers: int
    width: int
    height: int
    frames: int
    steps: int
    text: int  # rows of the texts without their padding
    chunk: int  # tokens that we work on at a time, at most

    def __post_init__(self) -> None:
        odd = self.dim % 384 or self.width % 32 or self.height % 32 or self.frames % 4 != 1
        if odd or not 0 < self.text <= TEXT_ROWS:
            raise BadRequest(
                "the transformer cannot have these sizes",
                got=f"dim {self.dim}, {self.width}x{self.height}, {self.frames} frames, "
                f"{self.text} rows of text",
                wanted=f"dim a multiple of 384, width and height of 32, frames 4n+1, text from 1 "
                f"to {TEXT_ROWS}",
            )

    @property
    def config(self) -> DitConfig:
        """Config of the network, with the proportions of the published one."""
        return DitConfig(
            dim=self.dim,
            ffn_dim=14 * self.dim // 3,
            num_heads=self.dim // HEAD_DIM,
            num_layers=self.layers,
            text_dim=4096,
            text_len=TEXT_ROWS,
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latent."""
        t, h, w = VAE_STRIDE
        return (self.frames - 1) // t + 1, self.height // h, self.width // w

    @property
    def tokens(self) -> int:
        """Number of tokens of the clip."""
        t, h, w = self.grid
        return t * h * w // 4

    @property
    def stage(self) -> StageConfig:
        """Config of the stage, with shift and guidance of the built-in high-res presets."""
        return StageConfig(
            width=self.width, height=self.height, steps=self.steps, shift=5.5, guidance=5.0
        )

    def inputs(self) -> tuple[Tensor, TextContext]:
        """Return noise and texts."""
        generator = torch.Generator().manual_seed(1)
        config = self.config
        noise = torch.randn(config.in_dim, *self.grid, generator=generator)
        cond, uncond = torch.randn(2, self.text, config.text_dim, generator=generator)
        return noise, TextContext(cond=cond, uncond=uncond)


def measure_dit_peers(work: DitWork, rounds: int) -> Result:
    """Compare the transformers, with `rounds` samples of each."""
    cpu = torch.device("cpu")
    identity = identify(cpu, operations=usual_operations(cpu))
    trials = run_in_turns(__name__, (DIFFUSERS, PER_TOKEN, OURS), work, rounds)
    figures = figures_of(trials)
    reference = trials[DIFFUSERS].output
    with torch.device("meta"):
        parameters = sum(x.numel() for x in WanDiT(work.config).parameters())
    stage = work.stage
    scope = {
        "words": "one denoising stage of the plain Wan transformer, two passes a step",
        "network": f"width {work.dim}, {work.layers} blocks, {parameters} parameters",
        "clip": f"{work.width}x{work.height}, {work.frames} frames, {work.tokens} tokens",
        "sampler": f"{work.steps} steps of {stage.solver}, shift {stage.shift}, "
        f"guidance {stage.guidance}",
        "text": f"{work.text} rows, which diffusers pads to {TEXT_ROWS}",
        "chunk": f"{work.chunk} tokens at a time in ours",
        "precision": "fp32",
        "device": "cpu",
    }
    theirs = f"WanTransformer3DModel of diffusers ({version('diffusers')})"
    return replace(
        envelope("dit-peers", scope, identity),
        figures=figures,
        sides={
            DIFFUSERS: f"{theirs}, one timestep",
            PER_TOKEN: f"{theirs}, a timestep per token",
            OURS: "this runtime's segmented transformer, on eager engines",
        },
        ratios=ratios_of(figures, OURS, (DIFFUSERS, PER_TOKEN)),
        differences=tuple(
            OutputDifference(
                side=name,
                against=DIFFUSERS,
                max_abs=(trial.output - reference).abs().max().item(),
                unit="latent",
                relative_l2=relative_l2(trial.output, reference),
            )
            for name, trial in trials.items()
            if name != DIFFUSERS
        ),
    )


def prepare(contender: str, work: DitWork) -> tuple[Run, Iterable[Tensor]]:
    """Return the stage of a contender, and the weights and inputs that it uses."""
    noise, text = work.inputs()
    theirs = their_net(work.config)
    if contender == OURS:
        ours = our_net(theirs, work.config, work.chunk)
        run = partial(our_stage, ours, text, noise, work.stage)
    else:
        per_token = contender == PER_TOKEN
        run = partial(their_stage, theirs, text, noise, work.stage, per_token=per_token)
    held = [noise, text.cond, text.uncond, *theirs.state_dict().values(), *theirs.buffers()]
    return run, held


def their_net(config: DitConfig) -> Any:
    """Return WanTransformer3DModel with random weights."""
    torch.manual_seed(0)
    return wan_transformer(config).requires_grad_(False).eval()


def our_net(theirs: Any, config: DitConfig, chunk: int) -> SegmentedDiT:
    """Return ours with their weights, on eager engines, as a stage receives it."""
    with torch.device("meta"):
        net = WanDiT(config).requires_grad_(False)
    renamed = ((keymaps.dit_from_diffusers(name), x) for name, x in theirs.state_dict().items())
    net.load_state_dict({name: x for name, x in renamed if name is not None}, assign=True)
    segments = segments_of(config, "fp32", chunk)
    return SegmentedDiT(net, segments, eager_engines(segments))


def our_stage(net: SegmentedDiT, text: TextContext, noise: Tensor, stage: StageConfig) -> Tensor:
    """Run the draft stage: the latent [C, T, H, W]."""
    with torch.inference_mode():
        return denoise_draft(net, text, noise, stage, Compat(), lambda share: None).x


def their_stage(
    net: Any, text: TextContext, noise: Tensor, stage: StageConfig, *, per_token: bool
) -> Tensor:
    """Run the denoising loop of WanPipeline, [C, T, H, W], with our sampler in place of theirs."""
    schedule = make_schedule(stage.solver, stage.steps, stage.shift)
    texts = [
        F.pad(rows, (0, 0, 0, TEXT_ROWS - len(rows)))[None]
        for rows in (text.of("cond"), text.of("uncond"))
    ]
    _, frames, rows, columns = noise.shape
    tokens = frames * rows * columns // 4

    def velocities(x: Tensor, step: int) -> list[Tensor]:
        t = time_input(schedule.timesteps[step], x.device)  # [1]
        if per_token:
            t = t.expand(1, tokens)
        return [net(x[None], t, padded, return_dict=False)[0][0] for padded in texts]

    with torch.inference_mode():
        return sample(velocities, noise, schedule.sigmas, stage.solver, stage.guidance)


if __name__ == "__main__":
    serve(DitWork, prepare)
