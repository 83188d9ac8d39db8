# SPDX-License-Identifier: Apache-2.0
"""The closed form of the encoder's memory against the ledger, at full size on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pw_bench.measure.tensor_ledger import Ledger
from pw_export.nano import NANO_VAE
from pw_export.wan22_configs import VAE
from pw_runtime.models import VaeEncoder
from pw_runtime.planning.encode_memory import encode_flop, encode_memory
from pw_runtime.stages.encode import encode_video
from pw_runtime.types import VaeConfig

SIZES = [(448, 256), (1280, 704)]


def accounted(config: VaeConfig, width: int, height: int, chunks: int) -> int:
    """Peak of all tensors while a picture, and chunks of frames after it, are encoded."""
    net = VaeEncoder(config).requires_grad_(False)

    def video() -> Iterator[Tensor]:
        yield torch.zeros(3, 1, height, width)
        for _ in range(chunks):
            yield torch.zeros(3, 4, height, width)

    no_numbers = patch("pw_runtime.stages.encode.is_finite", lambda x: True)
    with torch.inference_mode(), no_numbers, Ledger() as ledger:
        ledger.enter(net.parameters(), "weights")
        ledger.restart()
        encode_video(net, video, lambda: None)
    return ledger.peak["cpu"]


def predicted(config: VaeConfig, width: int, height: int, *, video: bool) -> int:
    items = encode_memory(config, width=width, height=height, video=video)
    return sum(item.bytes for item in items)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("video", [False, True])
def test_the_closed_form_is_the_ledger_of_the_full_size_encoder(width, height, video) -> None:
    with FakeTensorMode():
        wanted = accounted(VAE, width, height, 2 if video else 0)
    assert abs(predicted(VAE, width, height, video=video) / wanted - 1) <= 0.02


@pytest.mark.parametrize("video", [False, True])
def test_the_closed_form_is_the_ledger_of_an_encoding_that_ran(video) -> None:
    wanted = accounted(NANO_VAE, 256, 128, 2 if video else 0)
    assert abs(predicted(NANO_VAE, 256, 128, video=video) / wanted - 1) <= 0.05


@pytest.mark.slow
def test_a_longer_video_takes_no_more_memory_than_its_latent() -> None:
    """From the third chunk on, all that grows is the result, which waits for the draft."""
    latent = 4 * 48 * 44 * 80
    with FakeTensorMode():
        short, long = (accounted(VAE, 1280, 704, chunks) for chunks in (2, 8))
    assert long - short <= 6 * latent


def test_the_arithmetic_is_that_of_the_convolutions() -> None:
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        VaeEncoder(NANO_VAE).requires_grad_(False)(torch.zeros(3, 9, 64, 128))
    counted = counter.get_flop_counts()["Global"]
    convolved = sum(flop for op, flop in counted.items() if "conv" in str(op))
    estimated = encode_flop(NANO_VAE, width=128, height=64, frames=9)
    assert abs(estimated / convolved - 1) <= 0.02
