# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of qk_norm_rope, interpreted, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_kernels.qk_norm_rope import reference, rms_norm, rope, run_kernel
from tests.kernels.accuracy import assert_as_accurate, assert_same_roundings, normal

EPS = 1e-6


def oracle(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    x = x.double()
    normed = x / (x.square().mean(-1, True) + EPS).sqrt() * gain.double()
    turned = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)))
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(-2)


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = 10 * normal(tokens, pairs, seed=5)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(1, 3, 192), (63, 6, 192), (127, 1, 64), (129, 3, 192), (129, 4, 96), (2, 24, 3072)],
)
def test_kernel(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k = 3 * normal(tokens, dim, dtype=dtype), normal(tokens, dim, dtype=dtype, seed=1)
    gains = [1 + normal(dim, dtype=dtype, seed=seed) / 4 for seed in (2, 3)]
    cos, sin = angles(tokens, dim // heads // 2)
    got = run_kernel(q, k, *gains, cos, sin, heads, EPS)
    wanted = reference(q, k, *gains, cos, sin, heads, EPS)
    for x, gain, ours, theirs in zip((q, k), gains, got, wanted, strict=True):
        assert ours.shape == (tokens, heads, dim // heads)
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, oracle(x, gain, cos, sin, heads))
        if dtype == torch.bfloat16:
            assert_same_roundings(ours, theirs)


def test_rows_of_a_packed_projection() -> None:
    packed = normal(5, 3 * 64, dtype=torch.bfloat16)
    q, k, _ = packed.split(64, dim=1)
    gain = torch.ones(64, dtype=torch.bfloat16)
    cos, sin = angles(5, 16)
    got = run_kernel(q, k, gain, gain, cos, sin, 2, EPS)
    wanted = run_kernel(q.contiguous(), k.contiguous(), gain, gain, cos, sin, 2, EPS)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_reference_is_rms_norm_then_rope() -> None:
    q, k, gain = normal(4, 64), normal(4, 64, seed=1), normal(64, seed=2)
    cos, sin = angles(4, 16)
    got = reference(q, k, gain, 2 * gain, cos, sin, 2, EPS)
    heads = rms_norm(k, 2 * gain, EPS).unflatten(-1, (2, 32))
    assert torch.equal(got[1], rope(heads, cos, sin))
