# SPDX-License-Identifier: Apache-2.0
"""norm_modulate, gate_residual and qk_norm_rope as operators: dispatch, tracing, bad input."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pw_kernels import op
from tests.kernels.accuracy import normal

TOKENS_4K, DIM, HEADS = 249_240, 3072, 24


@dataclass(frozen=True)
class Case:
    """An operation and arguments that it takes."""

    name: str
    arguments: tuple[Any, ...]

    @property
    def module(self) -> Any:
        return importlib.import_module(f"pw_kernels.{self.name}")

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(self.module, self.name)

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.pw, self.name)

    def with_argument(self, index: int, value: Any) -> tuple[Any, ...]:
        return (*self.arguments[:index], value, *self.arguments[index + 1 :])


def cases(tokens: int, dim: int, heads: int) -> list[Case]:
    x, bf16, rows = normal(tokens, dim), torch.bfloat16, normal(2, 6, dim, seed=1)
    q, k, gain = (normal(*shape).to(bf16) for shape in ((tokens, dim), (tokens, dim), (dim,)))
    angle = normal(tokens, dim // heads // 2)
    return [
        Case("norm_modulate", (x, rows[:, 0], rows[:, 1], 1e-6, bf16)),
        Case("gate_residual", (x, x.to(bf16), rows[:, 2])),
        Case("qk_norm_rope", (q, k, gain, gain, angle.cos(), angle.sin(), heads, 1e-6)),
    ]


CASES = {case.name: case for case in cases(6, 48, 3)}
NORM, GATE, QK = (CASES[name] for name in ("norm_modulate", "gate_residual", "qk_norm_rope"))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Caller(nn.Module):
    """A module of the one call, for torch.export: of its tensors; the rest is fixed."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = case.function
        self.fixed = tuple(a for a in case.arguments if not isinstance(a, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, *self.fixed)


@each_case
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(case.operator.default, case.arguments)


@each_case
def test_a_cpu_runs_the_reference(case: Case) -> None:
    wanted = as_tuple(case.module.reference(*case.arguments))
    for got in (case.function(*case.arguments), case.operator(*case.arguments)):
        assert all(torch.equal(*pair) for pair in zip(as_tuple(got), wanted, strict=True))


@each_case
def test_export_keeps_plain_pytorch(case: Case) -> None:
    tensors = tuple(a for a in case.arguments if isinstance(a, Tensor))
    program = torch.export.export(Caller(case), tensors)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not [target for target in called if target.startswith("pw")]
    got = as_tuple(program.module()(*tensors))
    wanted = as_tuple(case.function(*case.arguments))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@each_case
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("called", ["function", "operator"])
def test_compiles_as_one_graph(case: Case, backend: str, called: str) -> None:
    function = getattr(case, called)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend=backend)
    got, wanted = as_tuple(compiled(*case.arguments)), as_tuple(function(*case.arguments))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@each_case
def test_triton_on_a_cpu_is_refused(case: Case) -> None:
    with op.using("triton"), pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        case.function(*case.arguments)


@pytest.mark.parametrize("name", CASES)
def test_at_4k(name: str) -> None:
    """Without memory: the shapes, and that a packed projection needs 64-bit offsets."""
    meta = {
        "x": torch.empty(TOKENS_4K, DIM, device="meta"),
        "rows": torch.empty(31, 6, DIM, device="meta")[:30],
        "q": torch.empty(TOKENS_4K, 3 * DIM, device="meta", dtype=torch.bfloat16)[:, :DIM],
        "gain": torch.empty(DIM, device="meta", dtype=torch.bfloat16),
        "angle": torch.empty(TOKENS_4K, DIM // HEADS // 2, device="meta"),
    }
    x, gate, q, gain, angle = meta["x"], meta["rows"][:, 0], *list(meta.values())[2:]
    arguments = {
        "norm_modulate": (x, gate, gate, 1e-6, torch.bfloat16),
        "gate_residual": (x, q.contiguous(), gate),
        "qk_norm_rope": (q, q, gain, gain, angle, angle, HEADS, 1e-6),
    }[name]
    case = Case(name, arguments)
    for result in as_tuple(case.operator(*arguments)):
        assert result.shape[0] == TOKENS_4K
        assert result.is_contiguous()
    assert (TOKENS_4K - 1) * q.stride(0) > 2**31
    assert TOKENS_4K * DIM * 4 > 2**31  # bytes
    moved = case.module.cost(*arguments).bytes / (TOKENS_4K * DIM)
    least = {"norm_modulate": 6, "gate_residual": 10, "qk_norm_rope": 8}[name]
    assert least <= moved < 1.03 * least


BAD = [
    (NORM, 0, normal(48, 6).t(), "wants x contiguous"),
    (NORM, 0, normal(2, 3, 48), "wants x contiguous"),
    (NORM, 0, normal(7, 48), "wants rows .R, 48. with R dividing the 7 tokens"),
    (NORM, 0, normal(0, 48), "wants at least one token"),
    (NORM, 1, normal(2, 40), "wants rows"),
    (NORM, 2, normal(2, 48).half(), "wants fp32 rows"),
    (NORM, 2, normal(48, 2).t(), "wants rows contiguous along D"),
    (NORM, 1, normal(2, 48).to("meta"), "wants all tensors on cpu"),
    (GATE, 0, normal(48, 6).t(), "wants x contiguous"),
    (GATE, 0, normal(6, 48).int(), "wants x fp32, bf16 or fp16"),
    (GATE, 1, normal(6, 40), "wants y of x's shape"),
    (GATE, 1, normal(48, 6).t(), "wants y contiguous"),
    (GATE, 1, normal(6, 48).double(), "wants y fp32, bf16 or fp16"),
    (GATE, 1, normal(6, 48).to("meta"), "wants all tensors on cpu"),
    (GATE, 2, normal(48), "wants a gate .R, 48., got .48,."),
    (GATE, 2, normal(4, 48), "wants R to divide the 6 tokens"),
    (GATE, 2, normal(0, 48), "wants R to divide the 6 tokens"),
    (GATE, 2, normal(2, 48).bfloat16(), "wants an fp32 gate"),
    (GATE, 2, normal(48, 2).t(), "wants a gate contiguous along D"),
    (QK, 0, normal(48), "wants q .S, D."),
    (QK, 0, normal(6, 48).double(), "wants q fp32, bf16 or fp16"),
    (QK, 1, normal(5, 48).bfloat16(), "wants k of q's shape"),
    (QK, 1, normal(6, 48), "wants k and gains in q's torch.bfloat16"),
    (QK, 1, normal(48, 6).t().bfloat16(), "wants q and k contiguous along D"),
    (QK, 2, normal(47).bfloat16(), "wants gains of shape .48,."),
    (QK, 3, normal(48), "wants k and gains in q's torch.bfloat16"),
    (QK, 3, normal(96).bfloat16()[::2], "wants contiguous gains"),
    (QK, 3, normal(48).bfloat16().to("meta"), "wants all tensors on cpu"),
    (QK, 4, normal(6, 16), "wants cos and sin of shape .6, 8."),
    (QK, 5, normal(6, 8).bfloat16(), "wants cos and sin in fp32"),
    (QK, 5, normal(8, 6).t(), "wants contiguous cos and sin"),
    (QK, 6, 5, "wants num_heads that splits 48 channels"),
    (QK, 6, 48, "wants num_heads that splits 48 channels"),
    (QK, 6, 0, "wants num_heads that splits 48 channels"),
]


@pytest.mark.parametrize(("case", "index", "value", "message"), BAD)
def test_bad_input(
    case: Case, index: int, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checks stand before the operator; a machine without a GPU gets there by this alone.
    monkeypatch.setattr(case.module, "chosen", lambda *_: op.Choice("triton", "a test"))
    with pytest.raises(ValueError, match=f"pw::{case.name} {message}"):
        case.function(*case.with_argument(index, value))


@each_case
def test_good_input_passes_the_checks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.module, "chosen", lambda *_: op.Choice("triton", "a test"))
    got = as_tuple(case.function(*case.arguments))
    wanted = as_tuple(case.module.reference(*case.arguments))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_an_operation_is_registered_once() -> None:
    assert op.OPS["gate_residual"] is GATE.module.OP
    with pytest.raises(AssertionError, match="gate_residual is registered twice"):
        op.register(GATE.module.OP)
