# SPDX-License-Identifier: Apache-2.0
"""Input of a plan: the clip, the networks, and the memory that is free."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from pw_runtime.checkpoint.bundle import Networks
from pw_runtime.errors import BadRequest
from pw_runtime.planning.time_estimate import KNOWN, Rates, division_rates
from pw_runtime.sampling.schedule import steps_left
from pw_runtime.system.machine import available_memory_bytes, rss_bytes
from pw_runtime.types import (
    Budget,
    DitConfig,
    Network,
    Precision,
    Preset,
    Prompt,
    Request,
    RunOptions,
    StageConfig,
    StageName,
    TextEncoderConfig,
    TilingConfig,
    VaeConfig,
)

# dtype of a network in a bundle -> precision
_PRECISIONS: Mapping[str, Precision] = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The clip to make, and the networks to make it with."""

    preset: Preset
    stages: Mapping[StageName, StageConfig]
    transformers: Mapping[StageName, DitConfig]
    stored: Mapping[StageName, Precision | None]  # dtype of their files, where it is one
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    options: RunOptions
    loras: frozenset[StageName] = frozenset()  # networks that a LoRA is merged into
    encoded: tuple[StageConfig, ...] = ()  # stages for whose sizes pictures or videos are encoded
    video: bool = False  # videos are among them
    prompts: int = 1  # whose text and drafts wait between the stages
    in_memory: bool = False  # all their frames stay, and are not encoded
    ranks: int = 1  # processes with a device each
    divide_weights: bool = False  # among the ranks, also where they would fit whole
    sequence: int | None = None  # ranks of one pass; None: as is fastest
    rates: Rates = KNOWN["H200"]  # by which divisions among ranks are put in order
    padded: bool = False  # engines take whole chunks only
    decoder_engines: bool = False  # the decoder runs on engines
    scratch: Mapping[Network, int] = field(default_factory=dict)  # bytes that engines need
    process: int  # bytes of host memory that the program itself takes, in every rank

    @property
    def held_scratch(self) -> int:
        """Bytes on the device from when the engines are opened, before the first stage.

        All engines of a library share one buffer, as large as any of them needs.
        """
        return max(self.scratch.values(), default=0)

    @property
    def rgb(self) -> bool:
        """True where frames are decoded to RGB, as `stages.codecs.pixel_format_for` says."""
        lossless = self.in_memory or self.options.codec in ("ffv1", "png")
        return lossless or self.preset.compat.truncating_uint8

    @property
    def frame_bytes(self) -> int:
        """Bytes of a decoded frame: RGB, or planes with half as many."""
        last = list(self.stages.values())[-1]
        return last.width * last.height * (6 if self.rgb else 3) // 2

    @property
    def tiling(self) -> TilingConfig:
        """The requested tiling; the draft of a high-res preset is decoded in one piece."""
        draft = "highres" not in self.stages and self.preset.highres is not None
        return TilingConfig(overlap=self.preset.decode.overlap) if draft else self.preset.decode


def workload(
    networks: Networks,
    preset: Preset,
    options: RunOptions,
    *,
    loras: Collection[StageName] = (),
    encoded: tuple[StageConfig, ...] = (),
    video: bool = False,
    prompts: int = 1,
    ranks: int = 1,
    divide_weights: bool = False,
    sequence: int | None = None,
    padded: bool = False,
    decoder_engines: bool = False,
    scratch: Mapping[Network, int] | None = None,
    needed: Collection[str] | None = None,
) -> Workload:
    """Collect what a plan depends on; `needed` are the stages that run, None: all.

    Raises BadRequest where one of them has no network.
    """
    stages = preset.stages(draft_only=options.draft_only)
    entries = {"draft": networks.draft, "highres": networks.highres}
    transformers = {name: entry for name in stages if (entry := entries[name]) is not None}
    running = stages.keys() if needed is None else stages.keys() & needed
    if missing := running - transformers.keys():
        raise BadRequest(
            f"the preset has a {missing.pop()} stage, and the model has no network for it",
            do="add --draft-only, or convert the checkpoints again with --highres",
        )
    return Workload(
        preset=preset,
        stages=stages,
        transformers={name: entry.config for name, entry in transformers.items()},
        stored={name: _PRECISIONS.get(entry.dtype) for name, entry in transformers.items()},
        vae=networks.vae.config,
        text_encoder=networks.text_encoder.config,
        options=options,
        loras=frozenset(loras),
        encoded=encoded,
        video=video,
        prompts=prompts,
        ranks=ranks,
        divide_weights=divide_weights,
        sequence=sequence,
        padded=padded,
        decoder_engines=decoder_engines,
        scratch=scratch or {},
        process=rss_bytes(),
    )


def request_workload(
    networks: Networks,
    request: Request,
    *,
    loras: Collection[StageName] = (),
    prompts: int | None = None,
    ranks: int = 1,
    padded: bool = False,
    decoder_engines: bool = False,
    scratch: Mapping[Network, int] | None = None,
    needed: Collection[str] | None = None,
) -> Workload:
    """Collect the same of a request, whose prompts may start from pictures and videos.

    `prompts` are those of a batch; None: all of the request.

    Raises BadRequest as `workload` does.
    """
    draft = computed_draft(request.preset.draft, request.prompts, request.options.draft_strength)
    work = workload(
        networks,
        replace(request.preset, draft=draft),
        request.options,
        loras=loras,
        encoded=encoded_stages(request),
        video=any(prompt.draft_video is not None for prompt in request.prompts),
        prompts=len(request.prompts) if prompts is None else prompts,
        ranks=ranks,
        divide_weights=request.divide_weights,
        sequence=request.sequence,
        padded=padded,
        decoder_engines=decoder_engines,
        scratch=scratch,
        needed=needed,
    )
    return replace(work, in_memory=request.in_memory, rates=division_rates(request.device))


def everything(request: Request) -> frozenset[str]:
    """Return all stages of a run that takes over nothing."""
    return frozenset(("text", "encode", *request.computed, "decode"))


def encoded_stages(request: Request) -> tuple[StageConfig, ...]:
    """List the stages for whose sizes a run encodes pictures or videos."""
    names = {name for prompt in request.prompts for name in request.encoded(prompt)}
    return tuple(config for name, config in request.stages.items() if name in names)


def computed_draft(draft: StageConfig, prompts: Iterable[Prompt], strength: float) -> StageConfig:
    """Return the draft with the steps that are computed: those of the prompt with the most."""
    begun = all(prompt.draft_video is not None for prompt in prompts)
    return replace(draft, steps=steps_left(draft, strength)) if begun else draft


def empty_caches() -> None:
    """Give back the memory that PyTorch keeps after use: of the GPU, and pinned memory."""
    torch.cuda.empty_cache()
    if torch.cuda.is_initialized():  # nothing is pinned before, and builds for CPUs lack this
        torch._C._host_emptyCache()


def budget_of(
    device: torch.device, gpu: int | None, host: int | None, *, ranks: int = 1, held: int = 0
) -> Budget:
    """Return the budget: the named sizes, or else what is free now.

    The host memory is that of all ranks, which run on one machine. This process has taken `held`
    bytes of the device for what a plan counts; they are part of what it may take.

    Raises BadRequest for GPU memory in a run on the CPU, and where free memory is unknown.
    """
    if device.type == "cpu" and gpu is not None:
        raise BadRequest(
            "--gpu-memory limits the memory of a GPU, and this run is on the CPU",
            do="give --host-memory instead",
        )
    if device.type == "cuda":
        empty_caches()  # memory that PyTorch caches is free
    if host is None:
        host = available_memory_bytes()
        if host is None:
            raise BadRequest(
                "cannot determine free memory on this system",
                do="add --host-memory, e.g. 32GiB",
            )
        host += ranks * rss_bytes()  # what the program holds is part of what it may take
    if device.type == "cuda" and gpu is None:
        gpu = torch.cuda.mem_get_info(device)[0] + held
    return Budget(host=host, device=gpu)
