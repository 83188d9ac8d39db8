# SPDX-License-Identifier: Apache-2.0
"""The engines of the decoder: of one preset's last picture, used where they were built.

Unlike a transformer's, each is of one size of picture. A run never needs them: where they lack,
the decoder itself runs, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from pw_engines import EngineStore, digest_of
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.execution.decoder import SegmentedVae
from pw_runtime.execution.decoder_segments import segments_of_decode
from pw_runtime.execution.engine_lookup import (
    Choice,
    Compiler,
    EngineSet,
    build_command,
    find_engines,
)
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.models import VaeDecoder
from pw_runtime.presets import PRESETS
from pw_runtime.types import VAE_STRIDE, Preset, Request


def decoder_segments(
    bundle: Bundle, preset: Preset, compiler: Compiler, net: VaeDecoder | None = None
) -> dict[str, Segment]:
    """What decodes the preset's last picture, by name and size.

    Args:
        bundle: with the decoder.
        preset: whose high-res picture it is; its draft where it has no other.
        compiler: of the engines; with those of TensorRT the weights are baked.
        net: the bundle's decoder, to bake; without it such segments can be found, not built.
    """
    vae, last = bundle.networks.vae, preset.highres or preset.draft
    rows, columns = last.height // VAE_STRIDE[1], last.width // VAE_STRIDE[2]
    if not compiler.bakes:
        return segments_of_decode(vae.config, preset.decode, rows, columns)
    if net is None:
        with torch.device("meta"):
            net = VaeDecoder(vae.config).requires_grad_(False)
    # Of the files, which the bundle has and checks: the weights are gigabytes.
    digest = digest_of(bundle.files[name].sha256.encode() for name in vae.files)
    return segments_of_decode(vae.config, preset.decode, rows, columns, baked=net, digest=digest)


def choose_decoder(request: Request, bundle: Bundle, say: Callable[[str], None]) -> EngineSet:
    """What the decoder of a run will run on; said once, but for `--policy eager`.

    `--policy engines` asks for the transformers' engines: these are taken where they are.

    Raises:
        BadRequest: an engine cannot be opened.
    """
    if request.policy == "eager" or request.kernels == "triton":
        return EngineSet({}, Choice({}, "eager", "asked for"))
    if request.preset.decode.caches == "host":
        return EngineSet({}, Choice({}, "eager", "its past frames are to lie on the host"))
    if request.vae_precision != "fp32":
        return EngineSet({}, Choice({}, "eager", "its engines are fp32"))
    command = f"{build_command(request, bundle.root)} --preset {_name(request.preset)}"
    if request.draft_only and request.preset.highres is not None:
        found: EngineSet | str = "its engines are of the high-res picture, and a draft is decoded"
        remedy = ""
    else:
        found = find_engines(
            lambda compiler: decoder_segments(bundle, request.preset, compiler),
            EngineStore(),
            request.device,
            command,
        )
        remedy = f"; `{command}` makes them"
    if isinstance(found, EngineSet):
        say(f"the decoder runs on {found.choice.reason} ({found.choice.backend})")
        return found
    say(f"the decoder runs without engines ({found}){remedy}")
    return EngineSet({}, Choice({}, "eager", found))


def decoder_on(net: VaeDecoder, picked: EngineSet) -> VaeDecoder:
    """The decoder, on the engines picked for it."""
    if picked.choice.backend == "eager":
        return net
    # why the cast: it has all of a decoder that the decode stage uses
    return cast(VaeDecoder, SegmentedVae(net, picked.segments, picked.choice.engines))


def _name(preset: Preset) -> str:
    """As the command line takes it; what no built-in one equals was read from a file."""
    return next((name for name, one in PRESETS.items() if one == preset), "FILE.toml")
