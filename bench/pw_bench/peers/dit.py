# SPDX-License-Identifier: Apache-2.0
"""Our transformer in parts beside diffusers' WanTransformer3DModel: time, memory, difference.

    python -m pw_bench.peers.dit --out bench/results/NAME.json

A stage of a few steps from noise to latent, two passes a step, on this CPU: the same random
weights, noise and texts in fp32, the same sampler, a process of its own for every sample, the sides
in turns. diffusers knows neither adapter nor step size, so both run the plain Wan transformer: the
same blocks as in the high-res stage, under the draft's interface. Its passes are those of its
WanPipeline: texts padded to 512 rows, and one timestep, or (`expand_timesteps`, the setting of
Wan2.2-TI2V-5B) one for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from pw_bench.measure.commit import commit
from pw_bench.peers.subprocess_ab import Sample, in_turns, report
from pw_export import keymaps
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.models import WanDiT
from pw_runtime.sampling.schedule import make_schedule, time_input
from pw_runtime.sampling.solver import sample
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.machine import Machine, describe
from pw_runtime.types import VAE_STRIDE, Compat, DitConfig, StageConfig, TextContext

THEIRS, PER_TOKEN, OURS = "diffusers", "diffusers expand_timesteps", "ours"
HEAD_DIM = 128
TEXT_ROWS = 512  # max_sequence_length of WanPipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """All samples of one program, and the most bytes of tensors that it made and held."""

    name: str
    samples: list[Sample]
    ledger_bytes: int
    relative_l2: float  # of the difference to diffusers with one timestep
    max_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is computed: the network, the clip in pixels and frames, and how."""

    dim: int
    layers: int
    width: int
    height: int
    frames: int
    steps: int
    text: int  # rows of the texts that are no padding
    part: int  # most tokens that we work on at a time

    def __post_init__(self) -> None:
        whole = not (self.dim % 384 or self.width % 32 or self.height % 32 or self.frames % 4 != 1)
        if not whole or not 0 < self.text <= TEXT_ROWS:
            wanted = "dim in 384s, width and height in 32s, frames 4n+1, text up to 512"
            raise click.UsageError(f"wanted {wanted}, got {self}")

    @property
    def config(self) -> DitConfig:
        """The network, with the proportions of the published one."""
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
        """Of the clip."""
        t, h, w = self.grid
        return t * h * w // 4

    @property
    def plan(self) -> StageConfig:
        """The stage, with shift and guidance of the built-in presets' high-res stage."""
        return StageConfig(
            width=self.width,
            height=self.height,
            steps=self.steps,
            shift=5.5,
            guidance=5.0,
        )

    def inputs(self) -> tuple[Tensor, TextContext]:
        """Noise and texts."""
        generator = torch.Generator().manual_seed(1)
        config = self.config
        noise = torch.randn(config.in_dim, *self.grid, generator=generator)
        cond, uncond = torch.randn(2, self.text, config.text_dim, generator=generator)
        return noise, TextContext(cond=cond, uncond=uncond)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Content of the result file."""

    machine: Machine
    commit: str
    diffusers: str
    threads: int
    work: Work
    tokens: int
    parameters: int
    sides: list[Side]


def their_net(config: DitConfig) -> Any:
    """WanTransformer3DModel with random weights."""
    import diffusers

    torch.manual_seed(0)
    kind: Any = diffusers.WanTransformer3DModel
    net = kind(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    return net.requires_grad_(False).eval()


def our_net(theirs: Any, config: DitConfig, part: int) -> SegmentedDiT:
    """Ours with their weights, on eager engines, as a stage is given it."""
    with torch.device("meta"):
        net = WanDiT(config).requires_grad_(False)
    named = ((keymaps.dit_from_diffusers(name), x) for name, x in theirs.state_dict().items())
    net.load_state_dict({name: x for name, x in named if name is not None}, assign=True)
    segments = segments_of(config, "fp32", part)
    return SegmentedDiT(net, segments, eager_engines(segments))


def their_stage(
    net: Any, text: TextContext, noise: Tensor, plan: StageConfig, *, per_token: bool
) -> Tensor:
    """The denoising loop of WanPipeline, [C, T, H, W], with our sampler in the place of theirs."""
    schedule = make_schedule(plan.solver, plan.steps, plan.shift)
    texts = [F.pad(one, (0, 0, 0, TEXT_ROWS - len(one)))[None] for one in (text.cond, text.uncond)]
    _, frames, rows, columns = noise.shape
    tokens = frames * rows * columns // 4

    def velocities(x: Tensor, step: int) -> list[Tensor]:
        t = time_input(schedule.timesteps[step], x.device)  # [1]
        if per_token:
            t = t.expand(1, tokens)
        return [net(x[None], t, one, return_dict=False)[0][0] for one in texts]

    return sample(velocities, noise, schedule.sigmas, plan.solver, plan.guidance)


def run_side(side: str, work: Work, *, account: bool, file: Path) -> None:
    """In a child: run the stage once, write the latent to a file."""
    noise, text = work.inputs()
    theirs = their_net(work.config)
    run: Callable[[], Tensor]
    if side == OURS:
        ours = our_net(theirs, work.config, work.part)

        def run() -> Tensor:
            return denoise_draft(ours, text, noise, work.plan, Compat(), lambda part: None).x
    else:

        def run() -> Tensor:
            return their_stage(theirs, text, noise, work.plan, per_token=side == PER_TOKEN)

    held = [noise, text.cond, text.uncond, *theirs.state_dict().values(), *theirs.buffers()]
    with torch.inference_mode():
        report(run, held, account=account, file=file)


def compare(args: list[str], rounds: int) -> list[Side]:
    """All sides in turns, then their accounts."""
    taken = in_turns("pw_bench.peers.dit", [THEIRS, PER_TOKEN, OURS], args, rounds)
    wanted = taken[THEIRS].output
    sides = []
    for name, one in taken.items():
        difference = one.output - wanted
        side = Side(
            name=name,
            samples=one.samples,
            ledger_bytes=one.ledger_bytes,
            relative_l2=(difference.norm() / wanted.norm()).item(),
            max_abs=difference.abs().max().item(),
        )
        sides.append(side)
        click.echo(
            f"{name:26} {one}, differs by {side.relative_l2:.1e} (relative L2), "
            f"{side.max_abs:.1e} at most"
        )
    for name in (THEIRS, PER_TOKEN):
        click.echo(f"ours against {name}: {taken[OURS].against(taken[name])}")
    return sides


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Result file.")
@click.option("--dim", default=1152, show_default=True, help="A multiple of 384.")
@click.option("--layers", default=4, show_default=True)
@click.option("--width", default=1536, show_default=True, help="In pixels, a multiple of 32.")
@click.option("--height", default=896, show_default=True, help="In pixels, a multiple of 32.")
@click.option("--frames", default=9, show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--text", default=60, show_default=True, help="Rows of a text beside its padding.")
@click.option("--part", default=512, show_default=True, help="Tokens that we work on at a time.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--side", type=click.Choice([THEIRS, PER_TOKEN, OURS]), hidden=True)
@click.option("--account", is_flag=True, hidden=True)
def main(out: Path, rounds: int, side: str | None, account: bool, **sizes: int) -> None:
    """Compare the transformers."""
    work = Work(**sizes)
    if side is not None:
        run_side(side, work, account=account, file=out)
        return
    import diffusers

    args = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    with torch.device("meta"):
        parameters = sum(x.numel() for x in WanDiT(work.config).parameters())
    result = Result(
        machine=describe(),
        commit=commit(),
        diffusers=diffusers.__version__,
        threads=torch.get_num_threads(),
        work=work,
        tokens=work.tokens,
        parameters=parameters,
        sides=compare(args, rounds),
    )
    write_text(out, TypeAdapter(Result).dump_json(result, indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
