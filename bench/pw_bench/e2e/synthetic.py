# SPDX-License-Identifier: Apache-2.0
"""The published networks, and smaller ones, with random weights in memory.

Their latency and memory can be measured by anyone with the machine, without a download. Their
pictures are noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from pw_bench.choices import SyntheticSize
from pw_export.nano import NANO_DIT, NANO_TEXT_ENCODER, NANO_VAE, write_byte_tokenizer
from pw_export.wan22_configs import NETWORKS
from pw_runtime.checkpoint.bundle import (
    TOKENIZER,
    Bundle,
    FileRecord,
    Manifest,
    Networks,
    sha256_of,
)
from pw_runtime.models import expected_shapes
from pw_runtime.types import Network

BLOCK = 2**27  # random numbers that all weights are cut from: 256 MiB of host memory
STD = 0.02  # as networks are initialised for training
# As deep as the published network and a third as wide, for CPUs. Its draft is short and its decoder
# small: a clip is mostly its high-res stage.
_WIDE: Final = replace(NANO_DIT, dim=1024, ffn_dim=4864, num_heads=8, num_layers=30, text_dim=512)
_LARGE: Final = replace(
    NETWORKS,
    draft=replace(NETWORKS.draft, config=replace(_WIDE, num_layers=4)),
    highres=replace(
        NETWORKS.draft,
        config=replace(_WIDE, has_dt=True, adapter_dim=256, control_blocks=(1,)),
    ),
    vae=replace(NETWORKS.vae, config=NANO_VAE),
    text_encoder=replace(
        NETWORKS.text_encoder,
        config=replace(
            NANO_TEXT_ENCODER, dim=512, attention_dim=512, ffn_dim=1024, num_heads=8, num_layers=4
        ),
    ),
)
IN_MEMORY: Final[Mapping[SyntheticSize, Networks]] = {"large": _LARGE, "5b": NETWORKS}
_DTYPES: dict[Network, torch.dtype] = {"vae": torch.float32}  # the others are stored as bf16


def synthetic_bundle(folder: Path, networks: Networks = NETWORKS) -> Bundle:
    """Return a bundle of random weights; only its tokenizer, of bytes, is written to `folder`.

    Weights share their memory on the host; on a device each has its own, as always.
    """
    (folder / TOKENIZER).mkdir(parents=True)
    write_byte_tokenizer(folder / TOKENIZER, networks.draft.config.text_len)
    files = {
        f"{TOKENIZER}/{file.name}": FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file))
        for file in (folder / TOKENIZER).iterdir()
    }
    typed = replace(
        networks,
        draft=replace(networks.draft, dtype="BF16"),
        highres=None if networks.highres is None else replace(networks.highres, dtype="BF16"),
        vae=replace(networks.vae, dtype="F32"),
        text_encoder=replace(networks.text_encoder, dtype="BF16"),
    )
    manifest = Manifest(format=1, created_by="pw bench", source={}, networks=typed, files=files)

    @lru_cache
    def tensors(network: Network) -> dict[str, Tensor]:
        config = getattr(typed, network).config
        return _random(network, expected_shapes(network, config))

    return Bundle(
        root=folder,
        digest="random weights, seed 0",
        manifest=manifest,
        synthetic_tensors=lambda network: dict(tensors(network)),
    )


def _random(network: Network, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return norms that pass their input on, biases of zero, normal numbers for the rest."""
    dtype = _DTYPES.get(network, torch.bfloat16)
    largest = max(math.prod(shape) for shape in shapes.values())
    block = torch.empty(min(BLOCK, 2 * largest)).normal_(std=STD, generator=_generator()).to(dtype)
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if name.endswith(".bias"):
            tensors[name] = torch.zeros(shape, dtype=dtype)
        elif "norm" in name or name.endswith(".gamma"):
            tensors[name] = torch.ones(shape, dtype=dtype)
        elif size > len(block):
            tensors[name] = block.repeat(-(-size // len(block)))[:size].view(shape)
        else:
            start = start if start + size <= len(block) else 0
            tensors[name] = block[start : start + size].view(shape)
            start += size
    return tensors


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
