# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder on engines computes what the decoder does, frame by frame and strip by strip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pw_engines import Engine, aoti
from pw_engines.eager import EagerEngine
from pw_engines.engine import check_parity, relative_l2, require_parity
from pw_export.nano import NANO_VAE
from pw_export.wan22_configs import VAE
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.execution.decoder import SegmentedVae
from pw_runtime.execution.decoder_segments import (
    as_rows,
    engine_tiling,
    from_rows,
    segments_of_decode,
    segments_of_vae,
    stored_weights,
)
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.vae_blocks import CausalConv3d
from pw_runtime.presets import PRESETS
from pw_runtime.stages.decode import decode_frames
from pw_runtime.types import VAE_STRIDE, Compat, Latent, TilingConfig, VaeConfig
from tests.networks import TINY_VAE
from tests.stages.stores import LATENT_FRAMES, check_goes_on

CPU = torch.device("cpu")
ROWS, COLUMNS = 2, 9


def decoder(config: VaeConfig, seed: int = 0) -> VaeDecoder:
    """With random weights, in memory as `load_decoder` leaves them."""
    torch.manual_seed(seed)
    net = VaeDecoder(config).requires_grad_(False)
    stored = {name: channels_last(x) for name, x in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    return net


@pytest.fixture(scope="module")
def nano() -> VaeDecoder:
    return decoder(NANO_VAE)


def on_eager_engines(net: VaeDecoder, segments: dict[str, Segment]) -> SegmentedVae:
    engines = {
        name: EagerEngine(segment.spec, segment.module) for name, segment in segments.items()
    }
    return SegmentedVae(net, segments, engines)


def random_latent(frames: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(48, frames, rows, columns, generator=generator)


def clip(vae: VaeDecoder | SegmentedVae, latent: Tensor) -> list[Tensor]:
    """Colours of pixel blocks of every latent frame."""
    coarse, fine = CausalCache(), CausalCache()
    return [vae.fine(vae.coarse(frame, coarse), fine) for frame in latent.split(1, dim=1)]


@pytest.mark.parametrize(
    "plan",
    [
        TilingConfig(tiling="exact", strips=1),
        TilingConfig(tiling="exact", strips=2),
        TilingConfig(tiling="official", strips=2, overlap=1),
    ],
)
def test_a_decode_on_engines_equals_that_of_the_decoder(nano, plan) -> None:
    latent = Latent(x=random_latent(3))
    vae = on_eager_engines(nano, segments_of_decode(NANO_VAE, plan, ROWS, COLUMNS))
    expected = decode_frames(nano, latent, plan, Compat())
    got = decode_frames(vae, latent, plan, Compat())
    for chunk, expected_chunk in zip(got, expected, strict=True):
        assert chunk.start == expected_chunk.start
        assert torch.equal(chunk.frames, expected_chunk.frames)


def test_a_decode_on_engines_goes_on_to_the_same_bits(nano) -> None:
    plan = TilingConfig(strips=2)
    vae = on_eager_engines(nano, segments_of_decode(NANO_VAE, plan, ROWS, COLUMNS))
    check_goes_on(vae, Latent(x=random_latent(LATENT_FRAMES)), plan)


@pytest.mark.parametrize("columns", [3, COLUMNS])  # small pictures take other code of PyTorch
def test_results_and_memory_equal_those_of_the_decoder(nano, columns) -> None:
    vae = on_eager_engines(nano, segments_of_vae(NANO_VAE, ROWS, columns))
    own, engines = (CausalCache(), CausalCache()), (CausalCache(), CausalCache())
    for frame in random_latent(4, columns=columns).split(1, dim=1):
        x, y = nano.coarse(frame, own[0]), vae.coarse(frame, engines[0])
        assert torch.equal(x, y)
        assert torch.equal(nano.fine(x, own[1]), vae.fine(y, engines[1]))
        for mine, theirs in zip(own, engines, strict=True):
            assert mine.past.keys() == theirs.past.keys()
            assert not mine.first
            assert not theirs.first
            assert all(torch.equal(past, theirs.past[conv]) for conv, past in mine.past.items())


def test_the_decoder_goes_on_with_a_clip_that_engines_began(nano) -> None:
    latent = random_latent(3)
    vae = on_eager_engines(nano, segments_of_vae(NANO_VAE, ROWS, COLUMNS))
    coarse, fine = CausalCache(), CausalCache()
    got = [
        decoder_part.fine(decoder_part.coarse(frame, coarse), fine)
        for decoder_part, frame in zip((vae, nano, vae), latent.split(1, dim=1), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(got, clip(nano, latent), strict=True))


def test_memory_is_that_of_every_convolution_over_time() -> None:
    """The decoder's modules say which; what doubles frames has none before the second frame."""
    segments = segments_of_vae(NANO_VAE, ROWS, COLUMNS)
    net = VaeDecoder(NANO_VAE)
    expected = {
        name
        for name, module in net.named_modules()
        if isinstance(module, CausalConv3d) and module.kernel_size[0] > 1
    }
    seen: set[str] = set()
    for part in ("coarse", "fine"):
        first, later = (segments[f"vae_{part}_{which}"].spec for which in ("first", "next"))
        out = [tensor.name.removesuffix(".last") for tensor in later.outputs[1:]]
        into = [
            tensor.name.removesuffix(".past") for tensor in later.inputs if ".past" in tensor.name
        ]
        began = [tensor.name.removesuffix(".last") for tensor in first.outputs[1:]]
        assert out == into
        assert began == out[: len(began)]
        assert all(name.endswith("time_conv") for name in out[len(began) :])
        assert [tensor.shape for tensor in later.inputs[1 : 1 + len(out)]] == [
            tensor.shape for tensor in later.outputs[1:]
        ]
        assert not seen & set(out)
        seen |= set(out)
    frame = segments["vae_frame"].spec
    ends = {".past": frame.inputs, ".last": frame.outputs}
    into, out = (
        [x.name.removesuffix(end) for x in tensors if x.name.endswith(end)]
        for end, tensors in ends.items()
    )
    assert into == out
    assert not seen & set(out)
    seen |= set(out)
    assert seen == expected


def test_weights_are_handed_over_without_a_copy(nano) -> None:
    stored = stored_weights(nano)
    assert sum(name.endswith(".taps") for name in stored) == 3
    for name, weight in stored.items():
        rows = as_rows(name, weight)
        assert rows.is_contiguous()
        assert rows.data_ptr() == weight.data_ptr()
        assert torch.equal(from_rows(name, rows, weight.shape), weight)
        assert from_rows(name, rows, weight.shape).stride() == weight.stride()


def test_baked_segments_have_their_weights(nano) -> None:
    """The spec of the others does not change with the weights: one engine serves all."""
    latent = random_latent(2)
    baked = segments_of_vae(NANO_VAE, ROWS, COLUMNS, baked=nano)
    for name, segment in segments_of_vae(NANO_VAE, ROWS, COLUMNS).items():
        assert segment.spec.weights is None
        assert segment.spec.inputs[: len(baked[name].spec.inputs)] == baked[name].spec.inputs
        assert len(segment.spec.inputs) == len(baked[name].spec.inputs) + len(segment.weights)
    vae = on_eager_engines(nano, baked)
    pairs = zip(clip(vae, latent), clip(nano, latent), strict=True)
    assert all(torch.equal(frame, expected) for frame, expected in pairs)
    others = segments_of_vae(NANO_VAE, ROWS, COLUMNS, baked=decoder(NANO_VAE, seed=1))
    assert all(others[name].spec != segment.spec for name, segment in baked.items())


def test_sizes_and_engines_that_do_not_fit_are_refused(nano) -> None:
    segments = segments_of_vae(NANO_VAE, ROWS, COLUMNS)
    vae = on_eager_engines(nano, segments)
    with pytest.raises(ValueError, match=r"vae_coarse_first: expected x of shape .*got \(1, 2, 8"):
        vae.coarse(random_latent(1, columns=8), CausalCache())
    others = segments_of_vae(NANO_VAE, ROWS, COLUMNS + 1)
    engines = {name: EagerEngine(segment.spec, segment.module) for name, segment in others.items()}
    with pytest.raises(ValueError, match="vae_coarse_first was made for another segment"):
        SegmentedVae(nano, segments, engines)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("name", ["2k", "4k", "2k-square", "4k-portrait", "4k-square"])
def test_strips_of_the_presets_keep_every_tensor_within_32_bits(name) -> None:
    """Traced at full size, and nothing is allocated."""
    stage, plan = PRESETS[name].highres, PRESETS[name].decode
    assert stage is not None
    rows, columns = stage.height // VAE_STRIDE[1], stage.width // VAE_STRIDE[2]
    segments = segments_of_decode(VAE, plan, rows, columns)
    widths = {int(key.rpartition("x")[2]) for key in segments}
    assert len(segments) == 2 + 3 * (len(widths) - 1)  # the coarse part has one width, all columns
    for segment in segments.values():
        inputs = [torch.empty(tensor.sized({}), device="meta") for tensor in segment.spec.inputs]
        with Largest() as largest:
            outputs = segment.module(*inputs)
        segment.spec.check_outputs(outputs, {})
        assert 0 < largest.elements < 2**31


@pytest.mark.parametrize(
    ("tiling", "rows", "columns", "strips"),
    [
        (PRESETS["2k"].decode, 90, 160, 3),
        (PRESETS["4k"].decode, 134, 240, 8),
        (replace(PRESETS["4k"].decode, strips=12), 134, 240, 12),
        (replace(PRESETS["4k"].decode, tiling="official"), 134, 240, 4),
        (TilingConfig(), 2048, 2048, 1),  # no number is enough
    ],
)
def test_engines_have_strips_that_fit_into_their_scratch_memory(
    tiling: TilingConfig, rows: int, columns: int, strips: int
) -> None:
    found = engine_tiling(VAE, tiling, rows, columns)
    assert found == replace(tiling, strips=strips)
    assert engine_tiling(VAE, found, rows, columns) == found


@pytest.mark.parametrize("segment", ["vae_coarse_next", "vae_fine_next", "vae_frame"])
def test_the_published_decoder_is_exported_without_its_weights(segment) -> None:
    """A strip of 2k; the network has 2.2 GB of weights, and none of them is in the program."""
    exported = segments_of_vae(VAE, 90, 65)[segment]
    inputs = [torch.empty(tensor.sized({}), device="meta") for tensor in exported.spec.inputs]
    program = torch.export.export(exported.module, tuple(inputs), strict=False)
    assert not program.state_dict
    assert not program.constants
    shapes = [
        tuple(tensor.meta["val"].shape) for tensor in program.graph.find_nodes(op="placeholder")
    ]
    assert shapes == [tensor.shape for tensor in exported.spec.inputs]


@pytest.mark.slow
def test_compiled_segments_decode_as_the_decoder_does(tmp_path: Path) -> None:
    """Those of later frames; the first frame's are the same layers without a past, and run eager.

    A compilation of C++ takes 15 seconds, however small the segment is.
    """
    reason = aoti.unavailable(CPU)
    if reason is not None:
        pytest.skip(reason)
    config = replace(  # every kind of layer, few of each
        TINY_VAE, decoder_dims=(8, 8, 8, 8), decoder_blocks=1, temporal_downsample=(True, True)
    )
    net, latent = decoder(config), random_latent(3, columns=3)
    segments = segments_of_vae(config, ROWS, 3)
    engines: dict[str, Engine] = {}
    for name, segment in segments.items():
        if name.endswith("_first"):
            engines[name] = EagerEngine(segment.spec, segment.module)
            continue
        path = tmp_path / f"{name}.pt2"
        aoti.build(segment.spec, segment.module, path, CPU)
        engines[name] = aoti.load(segment.spec, path, CPU)
        require_parity(name, check_parity(engines[name], segment.module, CPU))
    result = clip(SegmentedVae(net, segments, engines), latent)
    for frame, expected in zip(result, clip(net, latent), strict=True):
        assert relative_l2(frame, expected) <= 1e-5
