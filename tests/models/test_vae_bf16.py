# SPDX-License-Identifier: Apache-2.0
"""The decoder in bf16: its error against fp32, beside that of the official code under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_bench.official import vae as oracle_vae
from pw_kernels import unpatchify_pixels
from pw_runtime.checkpoint.loader import channels_last, decoder_weight
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.types import Precision
from tests.closeness import relative_l2
from tests.networks import TINY_VAE
from tests.oracle import golden


def decoded(precision: Precision, z: Tensor) -> Tensor:
    weights = golden.load("vae_tiny_weights")
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    stored = {n: decoder_weight(n, weights[n], precision) for n in net.state_dict()}
    net.load_state_dict({n: channels_last(x) for n, x in stored.items()}, assign=True)
    coarse, fine = CausalCache(), CausalCache()
    blocks = [net.fine(net.coarse(frame, coarse), fine) for frame in z.split(1, dim=1)]
    return unpatchify_pixels(torch.cat(blocks, dim=1)[None])[0].clamp(-1, 1)


def test_bf16_errs_no_more_than_twice_as_much_as_the_official_code_under_autocast() -> None:
    z, weights = golden.load("vae_tiny_inputs")["z"][0], golden.load("vae_tiny_weights")
    exact, got = decoded("fp32", z), decoded("bf16", z)
    assert got.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        theirs = oracle_vae.decode(weights, z)
    theirs = theirs.float().reshape(exact.shape).clamp(-1, 1)
    error, official = relative_l2(got, exact), relative_l2(theirs, exact)
    assert 0 < error <= 2 * official
