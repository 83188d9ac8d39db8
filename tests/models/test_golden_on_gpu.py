# SPDX-License-Identifier: Apache-2.0
"""The networks on a GPU against tensors of the official implementation, in fp32 without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from pw_runtime.models import VaeDecoder, WanDiT
from pw_runtime.models.embeddings import sinusoid
from pw_runtime.types import DitConfig
from tests.closeness import max_abs
from tests.models.test_dit_golden import FP32_TOLERANCE
from tests.models.test_vae_golden import TOLERANCE, decode
from tests.networks import TINY_DRAFT, TINY_HIGHRES, TINY_VAE
from tests.oracle import golden

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


Net = TypeVar("Net", bound=nn.Module)


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=False), torch.inference_mode():
        yield


def on_gpu(name: str) -> dict[str, Tensor]:
    return {key: x.cuda() for key, x in golden.load(name).items()}


def network(config: DitConfig) -> WanDiT:
    net, weights = WanDiT(config).cuda(), on_gpu("dit_tiny_weights")
    return loaded(net, weights)


def loaded(net: Net, weights: dict[str, Tensor]) -> Net:
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net.requires_grad_(False)


@pytest.mark.parametrize("which", ["a", "b"])
def test_draft_network_equals_official(which: str) -> None:
    net, inputs = network(TINY_DRAFT), on_gpu("dit_tiny_inputs")
    x, text = inputs["x"], net.text_keys_values(inputs[f"ctx_{which}"])
    v = net(x, text, net.modulation(inputs["t_uniform"]), net.positions(x))
    assert max_abs(v.cpu(), golden.load("dit_tiny_outputs")[f"t2v_fp32_{which}"]) <= FP32_TOLERANCE


@pytest.mark.parametrize("which", ["a", "b"])
def test_highres_network_equals_official(which: str) -> None:
    net, inputs = network(TINY_HIGHRES), on_gpu("dit_tiny_inputs")
    t, dt = inputs["t_uniform"], inputs["dt_uniform"]
    steps = (sinusoid(t, TINY_HIGHRES.freq_dim), sinusoid(dt, TINY_HIGHRES.freq_dim))
    control = net.control(net.draft_features(inputs["lr_latents"][0]), *steps)
    x, text = inputs["x"], net.text_keys_values(inputs[f"ctx_{which}"])
    v = net(x, text, net.modulation(t, dt), net.positions(x), control)
    assert max_abs(v.cpu(), golden.load("dit_tiny_outputs")[f"hr_fp32_{which}"]) <= FP32_TOLERANCE


def test_decode_equals_official() -> None:
    decoder = loaded(VaeDecoder(TINY_VAE).cuda(), on_gpu("vae_tiny_weights"))
    chunks = decode(decoder, golden.load("vae_tiny_inputs")["z"][0].cuda())
    frames = torch.cat(chunks, dim=1).cpu()
    assert max_abs(frames, golden.load("vae_tiny_outputs")["decode_3_raw"][0]) <= TOLERANCE
