# SPDX-License-Identifier: Apache-2.0
"""What a plan is made for: the clip, the networks, and the memory there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pw_runtime.checkpoint.bundle import Networks
from pw_runtime.errors import BadRequest
from pw_runtime.system.machine import available_memory_bytes, rss_bytes
from pw_runtime.types import (
    Budget,
    Codec,
    DitConfig,
    Precision,
    Preset,
    Request,
    StageConfig,
    StageName,
    TextEncoderConfig,
    TilingConfig,
    VaeConfig,
)

# Of a tensor's dtype as safetensors writes it.
_PRECISIONS: Mapping[str, Precision] = {"F32": "fp32", "BF16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be made, with which networks."""

    preset: Preset
    stages: Mapping[StageName, StageConfig]
    transformers: Mapping[StageName, DitConfig]
    stored: Mapping[StageName, Precision | None]  # dtype of their files, where it is one
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    precision: Precision
    vae_precision: Precision
    codec: Codec
    chunk: int  # most tokens that the engines take at a time
    padded: bool = False  # they take no fewer
    decoder_engines: bool = False  # the decoder runs on engines
    process: int  # bytes of host memory that the program itself takes

    @property
    def decode(self) -> TilingConfig:
        """How the decode is to be cut; the draft of a high-res preset is decoded in one piece."""
        draft = "highres" not in self.stages and self.preset.highres is not None
        return TilingConfig() if draft else self.preset.decode


def workload_of(
    request: Request,
    networks: Networks,
    *,
    padded: bool = False,
    decoder_engines: bool = False,
    decode_only: bool = False,
) -> Workload:
    """What a request asks of a bundle's networks. Raises BadRequest where a stage has none."""
    return workload(
        networks,
        request.preset,
        draft_only=request.draft_only,
        precision=request.precision,
        vae_precision=request.vae_precision,
        codec=request.codec,
        chunk=request.chunk,
        padded=padded,
        decoder_engines=decoder_engines,
        decode_only=decode_only,
    )


def workload(
    networks: Networks,
    preset: Preset,
    *,
    draft_only: bool,
    precision: Precision,
    vae_precision: Precision,
    codec: Codec,
    chunk: int,
    padded: bool = False,
    decoder_engines: bool = False,
    decode_only: bool = False,
) -> Workload:
    """Collect what a plan depends on. Raises BadRequest where a stage that runs has no network."""
    stages = preset.stages(draft_only=draft_only)
    entries = {"draft": networks.draft, "highres": networks.highres}
    found = {name: entry for name in stages if (entry := entries[name]) is not None}
    if not decode_only and (missing := stages.keys() - found.keys()):
        raise BadRequest(f"the bundle has no {missing.pop()} network", do="add --draft-only")
    return Workload(
        preset=preset,
        stages=stages,
        transformers={name: entry.config for name, entry in found.items()},
        stored={name: _PRECISIONS.get(entry.dtype) for name, entry in found.items()},
        vae=networks.vae.config,
        text_encoder=networks.text_encoder.config,
        precision=precision,
        vae_precision=vae_precision,
        codec=codec,
        chunk=chunk,
        padded=padded,
        decoder_engines=decoder_engines,
        process=rss_bytes(),
    )


def budget_of(device: torch.device, gpu: int | None, host: int | None) -> Budget:
    """What was named, else what is free now.

    Raises BadRequest where the GPU's memory is named for a run on the CPU, or cannot be seen.
    """
    if device.type == "cpu" and gpu is not None:
        raise BadRequest("--gpu-memory for a run on the CPU", do="give --host-memory instead")
    if host is None:
        host = available_memory_bytes()
        if host is None:
            raise BadRequest(
                "this system does not tell how much memory is free",
                do="add --host-memory, as 32GiB",
            )
        host += rss_bytes()  # what the program has is part of what it may take
    if device.type == "cuda" and gpu is None:
        torch.cuda.empty_cache()  # what PyTorch holds and nothing uses is free
        gpu = torch.cuda.mem_get_info(device)[0]
    return Budget(host=host, device=gpu)
