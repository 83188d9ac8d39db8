# SPDX-License-Identifier: Apache-2.0
"""What the kernel bench runs: an operation at a true size, its rivals, and an exact answer.

A case holds everything on one device. Its oracle is computed in fp64 at sampled places alone, so
that full-size results are checked at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels import attention, op
from pw_kernels.attention import OP as ATTENTION
from pw_kernels.op import Cost, Implementation

TOKENS = {"tiny": 200, "draft": 3_472, "2k": 111_600, "4k": 249_240}
TEXT_KEYS = 79  # a prompt of usual length with two rows for its padding
SAMPLED = 64  # rows of a result that are compared, besides the first and the last ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation on given tensors, by several implementations."""

    op: str
    size: str
    candidates: Mapping[str, Callable[[], Tensor]]
    baseline: str  # the candidate that errors are compared with
    oracle: Callable[[], Tensor]  # fp64, the sampled places of the result
    sample: Callable[[Tensor], Tensor]  # those places of a candidate's result
    cost: Cost
    bound: str  # "flops" or "bytes": which ceiling counts


def sampled_rows(rows: int, device: torch.device) -> Tensor:
    """The first and last eight rows, and others between them: [R] indices in order."""
    generator = torch.Generator().manual_seed(rows)
    some = torch.randint(0, rows, (min(SAMPLED, rows),), generator=generator)
    ends = torch.cat((torch.arange(min(8, rows)), torch.arange(max(0, rows - 8), rows)))
    return torch.cat((some, ends)).unique().to(device)


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers made on the device, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def attention_case(size: str, device: torch.device, rivals: Sequence[Implementation]) -> Case:
    """Self-attention over all tokens of a clip, as the networks call it.

    Queries and keys look like those of the networks: unit length per head times a gain that lets
    softmax prefer some keys.
    """
    tokens, heads, width = TOKENS[size], 24 if size != "tiny" else 2, 128
    kind = torch.bfloat16
    q, k, v = (
        normal(tokens, heads, width, device=device, dtype=kind, seed=seed) for seed in range(3)
    )
    rows = sampled_rows(tokens, device)

    def by(implementation: Implementation) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with op.using("reference", attention=implementation):
                return attention(q, k, v)

        return run

    def oracle() -> Tensor:
        exact = []
        for head in range(heads):  # one at a time: the keys of one in fp64 are 0.25 GB at 4K
            logits = q[rows, head].double() @ k[:, head].double().T * width**-0.5
            exact.append(logits.softmax(-1) @ v[:, head].double())
        return torch.stack(exact, dim=1)  # [R, N, K]

    return Case(
        op="attention",
        size=size,
        candidates={name: by(name) for name in rivals},
        baseline="cudnn" if "cudnn" in rivals else "reference",
        oracle=oracle,
        sample=lambda out: out[rows],
        cost=ATTENTION.cost(q, k, v),
        bound="flops",
    )
