# SPDX-License-Identifier: Apache-2.0
"""Selection of the decoder's engines, which are built for the last picture of one preset.

Unlike a transformer's, each engine fits one picture size. A run never needs them: where they are
missing, the eager decoder runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from pw_engines import EngineStore, digest_of
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.execution.compilers import Compiler
from pw_runtime.execution.decoder import SegmentedVae
from pw_runtime.execution.decoder_segments import segments_of_decode
from pw_runtime.execution.engine_lookup import (
    ASKED_FOR,
    NONE_BUILT,
    EngineSet,
    Unavailable,
    build_command,
    find_engines,
)
from pw_runtime.execution.protocols import Decoder
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.models import VaeDecoder
from pw_runtime.presets import preset_name
from pw_runtime.system.places import check_cache
from pw_runtime.types import VAE_STRIDE, Preset, RunOptions, VaeConfig

# Reasons why a decoder needs no engines.
ONLY_FP32: Final = "decoder engines are fp32"
DRAFT_DECODED: Final = "its engines fit the high-res picture, and a draft is decoded"


def decoder_segments(
    bundle: Bundle, preset: Preset, compiler: Compiler, net: VaeDecoder | None = None
) -> dict[str, Segment]:
    """Return the segments that decode the preset's last picture, by name and size.

    Args:
        bundle: with the decoder.
        preset: its high-res picture, or its draft where it has no other.
        compiler: of the engines; those of TensorRT have the weights baked in, and OpenVINO has
            none.
        net: the bundle's decoder, to bake; without it such segments can be found, not built.
    """
    vae = bundle.networks.vae
    if not compiler.decodes:
        return {}
    if not compiler.bakes_weights:
        return unbaked_segments(vae.config, preset)
    rows, columns = _cells(preset)
    if net is None:
        with torch.device("meta"):
            net = VaeDecoder(vae.config).requires_grad_(False)
    # The files' digests, which the bundle holds and checks: the weights are gigabytes.
    digest = digest_of(bundle.files[name].sha256.encode() for name in vae.files)
    return segments_of_decode(vae.config, preset.decode, rows, columns, baked=net, digest=digest)


def unbaked_segments(config: VaeConfig, preset: Preset) -> dict[str, Segment]:
    """Return the same segments with weights as inputs, for any weights of these widths."""
    return segments_of_decode(config, preset.decode, *_cells(preset))


def _cells(preset: Preset) -> tuple[int, int]:
    """Return rows and columns of the preset's last latent."""
    last = preset.highres or preset.draft
    return last.height // VAE_STRIDE[1], last.width // VAE_STRIDE[2]


def select_decoder_engines(bundle: Bundle, preset: Preset, options: RunOptions) -> EngineSet:
    """Select the engines of a run's decoder.

    `--policy engines` demands the transformers' engines only: the decoder's run where they exist.

    Raises:
        BadRequest: an engine cannot be opened.
    """
    if options.policy == "eager":
        return _eager(ASKED_FOR)
    if options.vae_precision != "fp32":
        return _eager(ONLY_FP32)
    options = replace(options, blocks="segments")  # the decoder has none
    command = f"{build_command(options, bundle.root)} --preset {preset_name(preset)}"
    if options.draft_only and preset.highres is not None:
        return _eager(DRAFT_DECODED)
    store = EngineStore()
    check_cache(store.root)
    if not store.holds("vae_"):  # the keys take a run for shapes, which imports a compiler
        return _eager(NONE_BUILT)
    result = find_engines(
        lambda compiler: decoder_segments(bundle, preset, compiler),
        store,
        options.torch_device,
        command,
    )
    return _eager(result.reason) if isinstance(result, Unavailable) else result


def on_engines(net: VaeDecoder, engines: EngineSet) -> Decoder:
    """Return the decoder as it runs on the engines selected for it."""
    if engines.backend == "eager":
        return net
    return SegmentedVae(net, engines.segments, engines.engines)


def _eager(reason: str) -> EngineSet:
    return EngineSet({}, {}, "eager", reason)
