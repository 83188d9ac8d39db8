# SPDX-License-Identifier: Apache-2.0
"""The encode stage: chunk by chunk what the encoder makes of a whole clip."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pw_runtime.errors import BadResult, BadWeights
from pw_runtime.models import VaeEncoder
from pw_runtime.stages.encode import encode_video
from tests.networks import TINY_VAE


@pytest.fixture(scope="module")
def encoder() -> VaeEncoder:
    torch.manual_seed(0)
    return VaeEncoder(TINY_VAE).eval().requires_grad_(False)


def test_chunk_by_chunk_is_the_whole_clip_bit_for_bit(encoder: VaeEncoder) -> None:
    video = torch.rand(3, 13, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for chunk in (video[:, :1], *video[:, 1:].split(4, dim=1)):
            given.append(chunk.shape[1])
            yield chunk.clone()

    seen = []
    latent = encode_video(encoder, chunks, lambda: seen.append(len(given)))
    assert torch.equal(latent.x, encoder(video))
    assert seen == [1, 2, 3, 4], "no chunk is asked for before the one before it is encoded"
    assert torch.equal(encode_video(encoder, chunks, lambda: None).x, latent.x)


def test_a_latent_that_is_not_finite_names_the_weights_or_the_arithmetic() -> None:
    broken = VaeEncoder(TINY_VAE).requires_grad_(False)
    chunks = [torch.zeros(3, 1, 32, 32)]
    bias = broken.conv1.bias
    assert bias is not None
    bias.fill_(torch.nan)
    with pytest.raises(BadWeights, match=r"conv1\.bias"):
        encode_video(broken, lambda: chunks, lambda: None)
    bias.fill_(3e38)
    broken.conv1.weight.fill_(3e38)
    with pytest.raises(BadResult, match="latent of the picture or video"):
        encode_video(broken, lambda: chunks, lambda: None)
