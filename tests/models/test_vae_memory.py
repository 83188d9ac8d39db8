# SPDX-License-Identifier: Apache-2.0
"""What the decoder holds and makes: no joined or padded copies, nothing past 32 bits at 4K."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pw_export import wan22_configs
from pw_kernels.causal_conv3d import LARGEST
from pw_runtime.execution.decoder_segments import from_engine, to_engine
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.vae_blocks import (
    CausalConv3d,
    ResidualBlock,
    Upsample,
    interleave_frames,
)
from tests.closeness import max_abs
from tests.networks import TINY_VAE

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default)


class Calls(TorchDispatchMode):
    """Counts operations, keeps what causal convolutions were given, and the largest's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.convolved: list[Tensor] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__.removeprefix("mkldnn_")] += 1
        if func in CONVOLUTIONS:
            self.largest = max(self.largest, args[0].numel(), out.numel())
            if args[1].dim() == 5 and args[1].shape[2] > 1:
                self.convolved.append(args[0])
        return out


def full_size() -> VaeDecoder:
    """The published decoder without its weights."""
    with torch.device("meta"):
        return VaeDecoder(wan22_configs.VAE).requires_grad_(False)


def decoded(net: VaeDecoder, latent: Tensor) -> tuple[CausalCache, CausalCache, Calls]:
    """The caches after all latent frames, and what the last one called."""
    coarse, fine = CausalCache(), CausalCache()
    for frame in latent.split(1, dim=1):
        with Calls() as calls:
            net.fine(net.coarse(frame, coarse), fine)
    return coarse, fine, calls


def test_a_later_chunk_joins_and_pads_nothing() -> None:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    _, _, calls = decoded(net, torch.randn(48, 3, 2, 3))
    assert calls.names["convolution"] > 30
    assert not calls.names.keys() & {"cat", "stack", "constant_pad_nd"}


def test_every_clip_is_convolved_with_its_channels_last() -> None:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    _, _, calls = decoded(net, torch.randn(48, 2, 2, 3))
    assert len(calls.convolved) > 30
    for x in calls.convolved:
        assert x.is_contiguous(memory_format=torch.channels_last_3d)


def test_the_past_is_two_frames_of_every_causal_convolution() -> None:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    coarse, fine, _ = decoded(net, torch.randn(48, 3, 2, 3))
    past = coarse.past | fine.past
    causal = [m for m in net.modules() if isinstance(m, CausalConv3d) and m.kernel_size[0] > 1]
    assert set(past) == set(causal)
    assert {x.shape[2] for x in past.values()} == {2}
    for x in past.values():  # memory of its own, not a view that holds a chunk
        assert x.untyped_storage().nbytes() == x.numel() * 4


@pytest.mark.parametrize(("rows", "columns"), [(90, 160), (134, 240)], ids=["2k", "4k"])
def test_the_full_size_decoder_stays_within_32_bits(rows: int, columns: int) -> None:
    latent = torch.empty((48, 2, rows, columns), device="meta")
    _, fine, calls = decoded(full_size(), latent)
    assert calls.largest <= LARGEST
    assert max(x.shape[3] for x in fine.past.values()) == 8 * rows


def test_a_block_holds_its_input_and_two_of_its_own_tensors() -> None:
    """When its second convolution runs, the result of the first has gone."""
    block = ResidualBlock(8, 8).requires_grad_(False)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in CONVOLUTIONS:
                alive.append(sum(ref() is not None for ref in made))
                made.append(weakref.ref(out))
            return out

    with Watch():
        block(torch.randn(1, 8, 4, 5, 6), CausalCache())
    assert alive == [0, 0]


def test_frames_are_interleaved_as_stacking_would() -> None:
    x = torch.randn(1, 8, 3, 2, 5)
    wanted = torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)
    for order in (torch.contiguous_format, torch.channels_last_3d):
        got = interleave_frames(x.contiguous(memory_format=order))
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last_3d)


def test_taps_follow_the_weight() -> None:
    """They are made of it once, and again where it was loaded anew or changed its dtype."""
    up = Upsample(4, temporal=False).requires_grad_(False)
    x = torch.randn(1, 4, 2, 3, 5)

    def error() -> float:
        weight, bias = up.resample["1"].weight, up.resample["1"].bias
        assert isinstance(weight, Tensor)
        doubled = F.interpolate(x[0].transpose(0, 1), scale_factor=2.0).to(weight.dtype)
        wanted = F.conv2d(doubled, weight, bias, padding=1).transpose(0, 1)[None]
        return max_abs(up(x.to(weight.dtype), CausalCache()), wanted)

    assert error() < 1e-5
    taps = up.taps
    assert error() < 1e-5
    assert up.taps is taps
    other = Upsample(4, temporal=False)
    up.load_state_dict(other.state_dict())
    assert error() < 1e-5
    torch.nn.ModuleDict({"up": up}).double()
    assert error() < 1e-13
    torch.nn.ModuleDict({"up": up}).load_state_dict(
        {f"up.{name}": x.double() * 2 for name, x in other.state_dict().items()}, assign=True
    )
    assert error() < 1e-13


def test_activations_keep_strides_that_convolutions_know() -> None:
    """Seen: a batch stride of C had every 1x1 convolution copy its input twice."""
    upsample = Upsample(8, temporal=False).requires_grad_(False)
    x = torch.randn(1, 8, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    out = upsample(x, CausalCache())
    assert out.stride() == (out.numel(), 1, 8 * 64, 8 * 8, 8)
    assert from_engine(to_engine(out)).stride() == out.stride()
