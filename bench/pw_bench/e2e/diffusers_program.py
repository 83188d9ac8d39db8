# SPDX-License-Identifier: Apache-2.0
"""diffusers' WanPipeline as a side of the benchmark, with the weights of the same checkpoint.

It is their pipeline with the settings of Wan2.2-TI2V-5B (`expand_timesteps`, UniPC on flow sigmas,
texts padded to 512 rows, the VAE in fp32 and not tiled), kept loaded between clips. Two things are
said through its public arguments, so that it makes the clip that all programs make: the noise, and
the sigmas. Their own grid starts at 1 and not at 0.999, which no setting of the scheduler changes;
`set_timesteps` takes the official one. Bytes are made as their `export_to_video` makes them,
truncating, and go in one chunk of the whole clip to the encoder that all programs use.

diffusers knows neither the adapter nor the step size of the high-res stage: it makes drafts.
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

from pw_bench.e2e.job import Job
from pw_export import keymaps
from pw_export.checkpoints import Part, open_checkpoint
from pw_export.sources import Refs
from pw_runtime.errors import BadRequest
from pw_runtime.models import build_text_encoder
from pw_runtime.models.text_encoder import TIED_KEY
from pw_runtime.sampling.schedule import UNIPC_SIGMA_MAX
from pw_runtime.stages.write import write_video
from pw_runtime.system.trace import observe, span
from pw_runtime.types import (
    PATCH,
    TRAIN_STEPS,
    VAE_STRIDE,
    DitConfig,
    FrameChunk,
    Precision,
    StageConfig,
    TextEncoderConfig,
    VaeConfig,
)

MAX_POSITIONS = 1024  # of their rotary table
COMPILING_CALLS = {"transformer": 1, "decoder": 3}  # frames 1, 2 and 3 have different pasts


@dataclass(frozen=True, slots=True)
class Loaded:
    """The pipeline, and how many rows texts are padded to, which is no setting of it."""

    pipeline: Any
    text_len: int


class Diffusers:
    """Makes clips of one checkpoint. A second clip finds the pipeline loaded.

    Attributes:
        compiled: whether transformer and VAE decoder go through torch.compile.
    """

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled
        self._loaded: Loaded | None = None
        self._made_for: tuple[Path, str, Precision] | None = None

    def clip(self, job: Job, video: Path) -> None:
        """From files to a closed video file.

        Raises BadRequest for a clip that WanPipeline does not make, ValueError for a job of another
        checkpoint, device or precision than the first one.
        """
        require_draft(job)
        made_for = (job.checkpoint, job.device, job.precision)
        if self._made_for not in (None, made_for):
            raise ValueError(f"loaded for {self._made_for}, asked for {made_for}")
        self._made_for = made_for
        with span("load"):
            if self._loaded is None:
                self._loaded = load_pipeline(job)
                if self.compiled:
                    compile_networks(self._loaded.pipeline)
        plan, pipeline, text_len = job.preset.draft, self._loaded.pipeline, self._loaded.text_len
        pipeline.scheduler = scheduler(plan)
        with span("text"), torch.no_grad():
            cond, uncond = pipeline.encode_prompt(
                job.prompt, job.negative, max_sequence_length=text_len
            )
        with Steps(plan.steps) as steps:
            frames: np.ndarray = pipeline(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond,
                width=plan.width,
                height=plan.height,
                num_frames=job.preset.video.frames,
                num_inference_steps=plan.steps,
                guidance_scale=plan.guidance,
                latents=load_file(job.noise)["draft_noise"][None].to(job.device),
                callback_on_step_end=steps.ended,
                max_sequence_length=text_len,
            ).frames[0]
        with span("encode"):
            write_frames(job, frames, video)


def require_draft(job: Job) -> None:
    """Raise BadRequest for a clip that WanPipeline does not make."""
    preset = job.preset
    problems = []
    if preset.highres is not None:
        problems.append("a high-res stage, whose adapter and step size diffusers does not know")
    if preset.draft.solver != "unipc":
        problems.append(f"the solver {preset.draft.solver}")
    if preset.draft.guidance <= 1:
        problems.append(f"guidance {preset.draft.guidance}; up to 1 they leave it out")
    if preset.compat.bf16_einsum or preset.compat.bf16_timesteps:
        problems.append("roundings of the official code")
    if problems:
        raise BadRequest(
            "diffusers does not make this clip",
            got="; ".join(problems),
            wanted="a preset without [highres], unipc, guidance above 1, no [compat] of sampling",
            do="compare with diffusers at a preset like draft",
        )


class Steps:
    """Spans of what the pipeline does, which tells of nothing but the ends of its steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._stage, self._step = ExitStack(), ExitStack()

    def __enter__(self) -> Steps:
        self._stage.enter_context(span("draft"))
        self._step.enter_context(span("step 1"))
        return self

    def ended(self, pipeline: Any, i: int, t: Tensor, got: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `callback_on_step_end`; after the last step what is left is the decode."""
        self._step.close()
        observe("latent", got["latents"][0])
        if i + 1 < self._steps:
            self._step.enter_context(span(f"step {i + 2}"))
        else:
            self._stage.close()
            self._stage.enter_context(span("decode"))
        return {}

    def __exit__(self, *error: object) -> None:
        self._step.close()
        self._stage.close()


def scheduler(plan: StageConfig) -> Any:
    """Their UniPC on the official sigmas of a stage."""
    from diffusers import UniPCMultistepScheduler

    kind: Any = UniPCMultistepScheduler
    made = kind(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=plan.shift,
    )
    grid = np.linspace(UNIPC_SIGMA_MAX, 0.0, plan.steps + 1)[: plan.steps]
    # why: the pipeline passes the number of steps alone
    made.set_timesteps = partial(made.set_timesteps, sigmas=grid)
    return made


def load_pipeline(job: Job) -> Loaded:
    """WanPipeline of the official files, on the job's device."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer

    files = open_checkpoint(job.checkpoint, None, None, ema=False, say=lambda line: None)
    tokenizer = files.tokenizer[0].parent
    kind: Any = WanPipeline
    pipeline = kind(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer, local_files_only=True),
        text_encoder=text_encoder(files.text_encoder, job.precision),
        transformer=transformer(files.draft, job.precision),
        vae=autoencoder(files.vae),
        scheduler=scheduler(job.preset.draft),
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(pipeline.to(job.device), files.draft.config.text_len)


def text_encoder(part: Part[TextEncoderConfig], precision: Precision) -> Any:
    """transformers' UMT5EncoderModel."""
    net = build_text_encoder(part.config)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    weights = {name: ref.read().to(dtype) for name, ref in part.refs.items()}
    weights[TIED_KEY] = weights["shared.weight"]
    net.load_state_dict(weights, assign=True)
    return net.requires_grad_(False)


def transformer(part: Part[DitConfig], precision: Precision) -> Any:
    """WanTransformer3DModel; in bf16 with the modules in fp32 that their loader keeps there."""
    from diffusers import WanTransformer3DModel

    config = part.config
    kind: Any = WanTransformer3DModel
    with torch.device("meta"):
        net = kind(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    net.rope = type(net.rope)(config.head_dim, (1, PATCH, PATCH), MAX_POSITIONS)
    kept = tuple(net._keep_in_fp32_modules)

    def dtype(name: str) -> torch.dtype:
        high = precision == "fp32" or any(module in name.split(".") for module in kept)
        return torch.float32 if high else torch.bfloat16

    weights = named(part.refs, keymaps.dit_to_diffusers)
    net.load_state_dict({name: x.to(dtype(name)) for name, x in weights.items()}, assign=True)
    return net.requires_grad_(False).eval()


def autoencoder(part: Part[VaeConfig]) -> Any:
    """AutoencoderKLWan in fp32, as their examples load it."""
    from diffusers import AutoencoderKLWan

    config = part.config
    kind: Any = AutoencoderKLWan
    base = config.encoder_dims[0]
    with torch.device("meta"):
        net = kind(
            base_dim=base,
            decoder_base_dim=config.decoder_dims[-1],
            z_dim=config.z_dim,
            dim_mult=[dim // base for dim in config.encoder_dims[1:]],
            num_res_blocks=config.encoder_blocks,
            temperal_downsample=list(config.temporal_downsample),
            is_residual=True,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2,
            patch_size=PATCH,
            scale_factor_temporal=VAE_STRIDE[0],
            scale_factor_spatial=VAE_STRIDE[1],
            latents_mean=list(config.latent_mean),
            latents_std=list(config.latent_std),
        )
    weights = named(part.refs, keymaps.vae_to_diffusers)
    net.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
    return net.requires_grad_(False).eval()


def named(refs: Refs, translate: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors of a network under their names."""
    weights = {}
    for name, ref in refs.items():
        theirs = translate(name)
        assert theirs is not None, name
        weights[theirs] = ref.read()
    return weights


def compile_networks(pipeline: Any) -> None:
    """Have transformer and decoder compiled by their first calls, which are spans of that name."""
    for net, calls in (
        (pipeline.transformer, COMPILING_CALLS["transformer"]),
        (pipeline.vae.decoder, COMPILING_CALLS["decoder"]),
    ):
        net.forward = told(torch.compile(net.forward), calls)


def told(compiled: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The same function, whose first calls are spans."""
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
    """The video file of values [F, H, W, 3] in [0, 1]."""
    whole = torch.from_numpy(np.stack([(frame * 255).astype(np.uint8) for frame in frames]))
    plan = job.preset.draft
    write_video(
        [FrameChunk(start=0, pixel_format="rgb24", frames=whole)],
        video,
        width=plan.width,
        height=plan.height,
        frames=len(whole),
        fps=job.preset.video.fps,
        codec=job.codec,
    )
