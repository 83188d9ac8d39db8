# SPDX-License-Identifier: Apache-2.0
"""The transformer's pointwise operations as operators: dispatch, tracing, true sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pw_kernels import launcher, op
from tests.kernels.pointwise import CASES, GRIDS, LEAST, Case, copies, meta_case, results, same

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Caller(nn.Module):
    """A module of the one call, for torch.export: of its tensors; the rest is fixed."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function, self.arguments = case.function, case.arguments

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        arguments = [next(given) if isinstance(a, Tensor) else a for a in self.arguments]
        return self.function(*arguments)


@each_case
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(case.operator.default, case.arguments)


@each_case
def test_a_cpu_runs_the_reference(case: Case) -> None:
    expected = results(case.module.reference, case.arguments)
    for called in (case.function, case.operator):
        assert same(results(called, case.arguments), expected)


@each_case
def test_export_keeps_plain_pytorch(case: Case) -> None:
    tensors = tuple(a for a in copies(case.arguments) if isinstance(a, Tensor))
    program = torch.export.export(Caller(case), tensors)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not [target for target in called if target.startswith("pw")]
    assert same(results(program.module(), tensors), results(case.function, case.arguments))


@each_case
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("called", ["function", "operator"])
def test_compiles_as_one_graph(case: Case, backend: str, called: str) -> None:
    function = getattr(case, called)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend=backend)
    assert same(results(compiled, case.arguments), results(function, case.arguments))


@each_case
def test_triton_on_a_cpu_is_refused(case: Case) -> None:
    with op.using("triton"), pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        case.function(*case.arguments)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("name", LEAST)
def test_at_true_size(name: str, size: str) -> None:
    case, numel = meta_case(name, size)
    shapes = [a.shape for a in case.arguments if isinstance(a, Tensor)]
    for result in results(case.operator, case.arguments):
        assert result.shape in shapes
    moved = case.module.cost(*case.arguments).bytes / numel
    assert LEAST[name] <= moved < 1.03 * LEAST[name]


def test_a_packed_projection_at_4k_needs_64_bit_offsets() -> None:
    q = meta_case("qk_norm_rope", "4k")[0].arguments[0]
    assert (q.shape[0] - 1) * q.stride(0) > 2**31


@pytest.mark.parametrize("name", LEAST)
def test_one_piece_of_machine_code_serves_every_size(name: str) -> None:
    with launcher.recording((9, 0)) as variants:
        for size in GRIDS:
            case, _ = meta_case(name, size)
            case.module.run_kernel(*case.arguments)
    assert len(variants) == 1


def test_an_operation_is_registered_once() -> None:
    module = CASES["gate_residual"].module
    assert op.OPS["gate_residual"] is module.OP
    with pytest.raises(AssertionError, match="gate_residual is registered twice"):
        op.register(module.OP)
