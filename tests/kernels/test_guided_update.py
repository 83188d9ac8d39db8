# SPDX-License-Identifier: Apache-2.0
"""guided_update: its Triton kernel, interpreted, against PyTorch and fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_kernels import Update
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.guided_update import guided_update, reference, run_kernel
from pw_kernels.op import using
from pw_runtime.sampling.schedule import make_schedule
from pw_runtime.sampling.solver import dpm_update, sample, unipc_corrector, unipc_predictor
from pw_runtime.types import Solver
from tests.kernels.accuracy import assert_as_accurate, normal

UNIPC = make_schedule("unipc", 5, 5.8).sigmas
DPM = make_schedule("dpm++", 5, 5.8).sigmas
STEPS = {
    **{f"unipc {i}": (UNIPC[i], unipc_corrector(UNIPC, i), unipc_predictor(UNIPC, i), i)
       for i in range(5)},
    **{f"dpm++ {i}": (DPM[i], None, dpm_update(DPM, i), i) for i in range(5)},
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (48, 2, 4, 6), (3, 5, 7, 11), (1024,), (1025,)])
@pytest.mark.parametrize("step", STEPS)
def test_kernel(step: str, shape: tuple[int, ...]) -> None:
    sigma, corrector, predictor, index = STEPS[step]
    cond, uncond, x, base, before, earlier = (normal(*shape, seed=seed) for seed in range(6))
    history = (before if index > 0 else None, earlier if index > 1 else None)
    arguments = (cond, uncond, x, base, *history)
    wide = tuple(None if a is None else a.double() for a in arguments)
    how = (5.0, sigma, corrector, predictor)
    exact = reference(*wide, *how)
    for got, expected, oracle in zip(
        run_kernel(*arguments, *how), reference(*arguments, *how), exact, strict=True
    ):
        assert_as_accurate(got, expected, oracle)


@pytest.mark.parametrize(
    ("corrector", "predictor"),
    [(None, Update(0.5, 0.25)), (Update(0.5, 0.25, 2.0, 0.5), Update(0.5, 0.25, 2.0, 0.0, 0.5, 3))],
)
def test_formula(corrector: Update | None, predictor: Update) -> None:
    """Numbers that are exact in fp32, so that both agree to the last bit."""
    cond, uncond, x, base, before = (torch.full((4,), v) for v in (3.0, 1.0, 8.0, 6.0, 2.0))
    for run in (reference, run_kernel):
        following, corrected, m = run(
            cond, uncond, x, base, before, None, 2.0, 0.5, corrector, predictor
        )
        assert m[0] == 8 - 0.5 * (1 + 2 * (3 - 1)) == 5.5
        if corrector is None:
            assert corrected[0] == 8
            assert following[0] == 0.5 * 8 + 0.25 * 5.5
        else:
            assert corrected[0] == 0.5 * 6 + 0.25 * 2 + 2 * 0.5 * (5.5 - 2) == 7
            assert following[0] == 0.5 * 7 + 0.25 * 5.5 + 2 * 0.5 * (2 - 5.5) * 3


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_whole_run_of_the_kernel_equals_the_reference(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigmas = make_schedule(solver, 4, 5.5).sigmas
    seen: list[Tensor] = []

    def velocities(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return torch.tanh(x) + 0.1 * step, torch.sin(x)

    noise = normal(4, 3, 6, 10)
    seen.append(sample(velocities, noise, sigmas, solver, 5.0))
    monkeypatch.setattr("pw_runtime.sampling.solver.guided_update", launched)
    seen.append(sample(velocities, noise, sigmas, solver, 5.0))
    half = len(seen) // 2
    for ours, theirs in zip(seen[half:], seen[:half], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def launched(*arguments: object, bf16_einsum: bool) -> tuple[Tensor, ...]:
    assert not bf16_einsum
    return run_kernel(*arguments)  # type: ignore[arg-type]


def test_bf16_einsum_is_refused_by_the_kernel() -> None:
    x, predictor = normal(4), Update(0.5, 0.5)
    with (
        using("triton"),
        dispatch_anywhere(),
        pytest.raises(ValueError, match=r"pw::guided_update expects no bf16_einsum, .* got True"),
    ):
        guided_update(x, x, x, x, None, None, 5.0, 1.0, None, predictor, bf16_einsum=True)
