# SPDX-License-Identifier: Apache-2.0
"""diffusers' WanPipeline as a contender, with the weights of the same checkpoint.

It is their pipeline with the settings of Wan2.2-TI2V-5B (`expand_timesteps`, UniPC on flow sigmas,
texts padded to 512 rows, the VAE in fp32 and not tiled), kept loaded between clips. Noise and
sigmas are given through its public arguments, so that it makes the same clip as all programs.
Their own sigmas start at 1 and not at 0.999, which no setting of the scheduler changes;
`set_timesteps` takes the official ones. Bytes are made as their `export_to_video` makes them,
truncating, and go in one chunk of the whole clip to the encoder that all programs use.

diffusers supports neither the adapter nor the step size of the high-res stage: it makes drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.e2e.diffusers_networks import (
    rotary_table,
    umt5_encoder,
    wan_autoencoder,
    wan_transformer,
)
from pw_bench.e2e.job import ClipFacts, Job
from pw_export.checkpoints.parts import Part
from pw_export.checkpoints.published import open_checkpoint
from pw_export.checkpoints.tensor_refs import Refs
from pw_runtime.checkpoint import keymaps
from pw_runtime.errors import BadRequest
from pw_runtime.sampling.schedule import UNIPC_SIGMA_MAX
from pw_runtime.stages.write import write_video
from pw_runtime.system.trace import observe, span
from pw_runtime.types import (
    TRAIN_STEPS,
    DitConfig,
    FrameChunk,
    Precision,
    StageConfig,
    TextEncoderConfig,
    VaeConfig,
)

# Calls that compile; of the decoder three, since frames 1, 2 and 3 have different pasts.
COMPILING_CALLS = {"transformer": 1, "decoder": 3}


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """The pipeline, and the number of rows texts are padded to, which is not a setting of it."""

    pipeline: Any
    text_len: int


class DiffusersProgram:
    """Makes clips of one checkpoint. A second clip finds the pipeline loaded.

    Attributes:
        compiled: whether transformer and VAE decoder go through torch.compile.
    """

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled
        self._loaded: LoadedPipeline | None = None
        self._loaded_for: tuple[Path, str, Precision] | None = None

    def clip(self, job: Job, video: Path) -> ClipFacts:
        """Make the clip, from files to a closed video file.

        Raises BadRequest for a clip that WanPipeline does not make, ValueError for a job with
        another checkpoint, device or precision than the first one.
        """
        require_draft(job)
        loaded_for = (job.checkpoint, job.device, job.precision)
        if self._loaded_for not in (None, loaded_for):
            raise ValueError(f"loaded for {self._loaded_for}, asked for {loaded_for}")
        self._loaded_for = loaded_for
        with span("load"):
            if self._loaded is None:
                self._loaded = load_pipeline(job)
                if self.compiled:
                    compile_networks(self._loaded.pipeline)
        config, pipeline, text_len = job.preset.draft, self._loaded.pipeline, self._loaded.text_len
        pipeline.scheduler = scheduler(config)
        with span("text"), torch.no_grad():
            cond, uncond = pipeline.encode_prompt(
                job.prompt, job.negative, max_sequence_length=text_len
            )
        with StepSpans(config.steps) as steps:
            frames: np.ndarray = pipeline(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond,
                width=config.width,
                height=config.height,
                num_frames=job.preset.video.frames,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                latents=load_file(job.noise)["draft_noise"][None].to(job.device),
                callback_on_step_end=steps.on_step_end,
                max_sequence_length=text_len,
            ).frames[0]
        with span("encode"):
            write_frames(job, frames, video)
        return ClipFacts()


def require_draft(job: Job) -> None:
    """Raise BadRequest for a clip that WanPipeline does not make."""
    preset = job.preset
    problems = []
    if preset.highres is not None:
        problems.append("a high-res stage, whose adapter and step size diffusers lacks")
    if preset.draft.solver != "unipc":
        problems.append(f"the solver {preset.draft.solver}")
    if preset.draft.guidance <= 1:
        problems.append(f"guidance {preset.draft.guidance}; up to 1 they disable it")
    if preset.compat.bf16_einsum or preset.compat.bf16_timesteps:
        problems.append("roundings of the official code")
    if problems:
        raise BadRequest(
            "diffusers cannot make this clip",
            got="; ".join(problems),
            wanted="a preset without [highres], unipc, guidance above 1, no [compat] of sampling",
            do="compare with diffusers at a preset like draft",
        )


class StepSpans:
    """Spans of the pipeline's work; its only callback is at the end of each step."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._stage, self._step = ExitStack(), ExitStack()

    def __enter__(self) -> StepSpans:
        self._stage.enter_context(span("draft"))
        self._step.enter_context(span("step 1"))
        return self

    def on_step_end(
        self, pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Serve as `callback_on_step_end`; after the last step only the decode is left."""
        self._step.close()
        observe("latent", tensors["latents"][0])
        if i + 1 < self._steps:
            self._step.enter_context(span(f"step {i + 2}"))
        else:
            self._stage.close()
            self._stage.enter_context(span("decode"))
        return {}

    def __exit__(self, *error: object) -> None:
        self._step.close()
        self._stage.close()


def scheduler(config: StageConfig) -> Any:
    """Return their UniPC on the official sigmas of a stage."""
    from diffusers import UniPCMultistepScheduler

    make: Any = UniPCMultistepScheduler
    unipc = make(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.shift,
    )
    sigmas = np.linspace(UNIPC_SIGMA_MAX, 0.0, config.steps + 1)[: config.steps]
    # why: the pipeline passes only the number of steps
    unipc.set_timesteps = partial(unipc.set_timesteps, sigmas=sigmas)
    return unipc


def load_pipeline(job: Job) -> LoadedPipeline:
    """Load WanPipeline from the official files, on the job's device."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer

    files = open_checkpoint(job.checkpoint, None, None, ema=False, say=lambda line: None)
    tokenizer = files.tokenizer[0].parent
    make: Any = WanPipeline
    pipeline = make(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer, local_files_only=True),
        text_encoder=text_encoder(files.text_encoder, job.precision),
        transformer=transformer(files.draft, job.precision),
        vae=autoencoder(files.vae),
        scheduler=scheduler(job.preset.draft),
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipeline.to(job.device), files.draft.config.text_len)


def text_encoder(part: Part[TextEncoderConfig], precision: Precision) -> Any:
    """Return transformers' UMT5EncoderModel."""
    with torch.device("meta"):
        net = umt5_encoder(part.config)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    weights = {name: ref.read().to(dtype) for name, ref in part.refs.items()}
    alias, name = keymaps.TEXT_ENCODER_ALIAS  # tied: two names of one tensor
    net.load_state_dict(weights | {alias: weights[name]}, assign=True)
    return net.requires_grad_(False).eval()


def transformer(part: Part[DitConfig], precision: Precision) -> Any:
    """Return WanTransformer3DModel; in bf16 with the modules in fp32 that their loader keeps."""
    with torch.device("meta"):
        net = wan_transformer(part.config)
    net.rope = rotary_table(part.config, net)
    kept = tuple(net._keep_in_fp32_modules)

    def dtype(name: str) -> torch.dtype:
        high = precision == "fp32" or any(module in name.split(".") for module in kept)
        return torch.float32 if high else torch.bfloat16

    weights = read_renamed(part.refs, keymaps.dit_to_diffusers)
    net.load_state_dict({name: x.to(dtype(name)) for name, x in weights.items()}, assign=True)
    return net.requires_grad_(False).eval()


def autoencoder(part: Part[VaeConfig]) -> Any:
    """Return AutoencoderKLWan in fp32, as their examples load it."""
    with torch.device("meta"):
        net = wan_autoencoder(part.config)
    weights = read_renamed(part.refs, keymaps.vae_to_diffusers)
    net.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
    return net.requires_grad_(False).eval()


def read_renamed(refs: Refs, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Read the tensors of a network under diffusers' names."""
    weights = {}
    for name, ref in refs.items():
        theirs = rename(name)
        assert theirs is not None, name
        weights[theirs] = ref.read()
    return weights


def compile_networks(pipeline: Any) -> None:
    """Compile transformer and decoder in their first calls, which are spans named "compile"."""
    for net, calls in (
        (pipeline.transformer, COMPILING_CALLS["transformer"]),
        (pipeline.vae.decoder, COMPILING_CALLS["decoder"]),
    ):
        net.forward = with_spans(torch.compile(net.forward), calls)


def with_spans(compiled: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Return the same function with a span around each of its first calls."""
    left = calls

    def call(*args: Any, **options: Any) -> Any:
        nonlocal left
        if not left:
            return compiled(*args, **options)
        left -= 1
        with span("compile"):
            return compiled(*args, **options)

    return call


def write_frames(job: Job, frames: np.ndarray, video: Path) -> None:
    """Write values [F, H, W, 3] in [0, 1] as a video file."""
    whole = torch.from_numpy(np.stack([(frame * 255).astype(np.uint8) for frame in frames]))
    config = job.preset.draft
    write_video(
        [FrameChunk(start=0, pixel_format="rgb24", frames=whole)],
        video,
        width=config.width,
        height=config.height,
        frames=len(whole),
        fps=job.preset.video.fps,
        codec=job.codec,
    )
