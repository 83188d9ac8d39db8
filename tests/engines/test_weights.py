# SPDX-License-Identifier: Apache-2.0
"""Weights that come block by block give what resident ones give."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import torch

from pw_runtime.execution import weight_streaming
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.execution.weight_streaming import StreamedWeights
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.types import Blocks, Precision
from tests.engines.test_segments import CPU, HIGHRES, TOKENS, network, segmented, velocities


def elsewhere(net: WanDiT, precision: Precision) -> WanDiT:
    """The same network, its blocks' weights as a checkpoint has them: not yet converted."""
    torch.manual_seed(0)
    published = WanDiT(HIGHRES).requires_grad_(False)
    for weight in published.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    stored = {
        name: w if name.startswith("blocks.") else store_dit_weight(name, w, precision)
        for name, w in published.state_dict().items()
    }
    tables = {n: w for n, w in net.state_dict().items() if n.endswith("modulation")}
    published.load_state_dict(stored | tables, assign=True)
    return published


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("blocks", get_args(Blocks))
def test_streamed_weights_change_no_bit(precision: Precision, share: bool, blocks: Blocks) -> None:
    net = network(HIGHRES, precision)
    expected = velocities(segmented(net, precision, 9, blocks=blocks), [7, 3])
    streamed = elsewhere(net, precision)
    segments = segments_of(HIGHRES, precision, 9, blocks=blocks, tokens=TOKENS)
    weights = StreamedWeights(streamed, segments, precision, CPU)
    try:
        options: dict[str, Any] = {"weights": weights, "share_attention": share, "blocks": blocks}
        got = velocities(segmented(streamed, precision, 9, **options), [7, 3])
        again = velocities(segmented(streamed, precision, 9, **options), [7, 3])
    finally:
        weights.close()
    for reference, first, second in zip(expected, got, again, strict=True):
        assert torch.equal(reference, first)
        assert torch.equal(reference, second)


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    net = network(HIGHRES, "fp32")
    StreamedWeights(net, segments_of(HIGHRES, "fp32", 9), "fp32", CPU).close()
    assert set(threading.enumerate()) <= before


def test_slots_that_do_not_fit_leave_no_thread_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt may get the memory of the first slot, which is being filled."""
    before = set(threading.enumerate())
    refused, release = threading.Event(), threading.Event()
    made: list[object] = []

    class OnlyOne(weight_streaming._Slot):
        def __init__(self, like: list[torch.Tensor], device: torch.device) -> None:
            if made:
                refused.set()
                raise torch.OutOfMemoryError("not enough for a second slot")
            made.append(self)
            super().__init__(like, device)

        def fill(self, block: int, weights: list[torch.Tensor]) -> None:
            release.wait()
            super().fill(block, weights)

    def let_the_fill_go_on() -> None:
        refused.wait()
        release.set()

    helper = threading.Thread(target=let_the_fill_go_on)
    helper.start()
    monkeypatch.setattr(weight_streaming, "_Slot", OnlyOne)
    net, segments = network(HIGHRES, "fp32"), segments_of(HIGHRES, "fp32", 9)
    with pytest.raises(torch.OutOfMemoryError, match="a second slot"):
        StreamedWeights(net, segments, "fp32", CPU)
    helper.join()
    assert set(threading.enumerate()) <= before


def test_a_block_whose_copy_failed_once_is_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails twice raises, and the one after that has its weights."""
    net = network(HIGHRES, "bf16")
    segments = segments_of(HIGHRES, "bf16", 9)
    weights = StreamedWeights(net, segments, "bf16", CPU)
    convert, failing = weights._converted, list[int]()

    def converted(name: str) -> torch.Tensor:
        if failing:
            failing.pop()
            raise OSError("the disk is gone")
        return convert(name)

    monkeypatch.setattr(weights, "_converted", converted)
    stored = dict(net.named_parameters())
    try:
        weights.acquire("block_in", 0)
        for block, failures in ((1, 1), (0, 2)):
            failing[:] = range(failures)
            weights.release("block_in", 1 - block, block)
            if failures > 1:
                with pytest.raises(OSError, match="the disk is gone"):
                    weights.acquire("block_in", block)
            names = weight_streaming.names_in_block(segments["block_in"], block)
            got = weights.acquire("block_in", block)
            assert all(torch.equal(x, stored[name]) for x, name in zip(got, names, strict=True)), (
                f"block {block}"
            )
    finally:
        weights.close()


def test_only_one_block_is_held() -> None:
    net = network(HIGHRES, "bf16")
    segments = segments_of(HIGHRES, "bf16", 9)
    weights = StreamedWeights(net, segments, "bf16", CPU)
    try:
        first = [weight.data_ptr() for weight in weights.acquire("block_out", 0)]
        weights.release("block_out", 0, 1)
        assert [weight.data_ptr() for weight in weights.acquire("block_out", 1)] == first
        both = {name: weights.acquire(name, 1) for name in ("block_in", "block_in_first")}
        assert both["block_in"][0].data_ptr() == both["block_in_first"][0].data_ptr()
    finally:
        weights.close()
