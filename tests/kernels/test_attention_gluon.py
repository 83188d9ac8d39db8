# SPDX-License-Identifier: Apache-2.0
"""The Gluon attention kernel: its schedule on modelled barriers, its machine code for Hopper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pw_kernels.attention import reference_with_lse
from tests.closeness import max_abs
from tests.kernels.compiling import Report, assert_resources, reports_of
from tests.kernels.gluon_model import run

CASES = [(128, "bf16"), (128, "fp16"), (64, "bf16"), (64, "fp16")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Report]:
    """Reports by head width and dtype."""
    reports = reports_of(tmp_path_factory, "compile_attention")
    return {tuple(report["case"]): report for report in reports if "sass" in report}


each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.slow
@each_case
def test_warps_are_specialised_and_no_register_spills(
    compiled: dict[tuple[int, str], Report], case: tuple[int, str]
) -> None:
    report = compiled[case]
    assert_resources(report)
    assert not {"LDL", "STL"} & set(report["sass"])
    assert report["warps"] == 12
    assert {"HGMMA", "UTMALDG", "USETMAXREG"} <= set(report["sass"])


@pytest.mark.slow
@each_case
def test_exponentials_are_computed_while_values_are_added(
    compiled: dict[tuple[int, str], Report], case: tuple[int, str]
) -> None:
    """Those of a tile, and two that rescale, between both waits, in the loop of each consumer."""
    assert compiled[case]["exponentials"] == [64 * 128 // 128 + 2] * 2


@pytest.mark.slow
@each_case
def test_a_slot_is_given_back_after_all_warps_have_left_the_wait(
    compiled: dict[tuple[int, str], Report], case: tuple[int, str]
) -> None:
    """One thread arrives for 128: a warp still waiting would miss the phase if it came early."""
    assert compiled[case]["arrivals"] == 2 * 5  # k, k in the loop, v in the loop, q, v
    assert compiled[case]["synchronised"] == compiled[case]["arrivals"]


@pytest.mark.slow
@each_case
def test_descriptors_are_no_parameters(
    compiled: dict[tuple[int, str], Report], case: tuple[int, str]
) -> None:
    """5 pointers, 6 integers, the scale, and the two scratch pointers of every Triton kernel."""
    assert compiled[case]["parameters"] == 5 + 6 + 1 + 2


def inputs(queries: int, keys: int, heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(tokens, heads, 8) for tokens in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# queries, keys, heads, programs, stages; a tile has 8 queries and 8 keys
SCHEDULES = [
    (1, 1, 1, 1, 2),  # a single key
    (9, 8, 2, 1, 2),  # one tile of keys, four of queries in one program
    (17, 9, 2, 9, 2),  # fewer tiles of queries than programs
    (40, 100, 3, 4, 3),
    (64, 41, 2, 1, 4),  # 16 tiles for one program, slots in ever other phases
    (33, 50, 2, 1, 3),
    (20, 49, 2, 3, 3),
    (8, 4, 1, 1, 2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_schedule_ends_and_is_attention(
    schedule: tuple[int, int, int, int, int], seed: int
) -> None:
    """Whatever the order of warps and copies; the model itself asserts who may touch a slot."""
    queries, n_keys, heads, programs, stages = schedule
    q, k, v = inputs(queries, n_keys, heads)
    out, lse = run(q, k, v, programs=programs, keys=8, stages=stages, seed=seed)
    expected, expected_lse = reference_with_lse(q, k, v)
    assert max_abs(out, expected) < 1e-12
    assert max_abs(lse, expected_lse) < 1e-5  # the reference's is fp32


BROKEN: list[tuple[str, Callable[..., None], str]] = [
    ("wait", lambda barrier, parity: None, "read before it arrived|overwritten while it is read"),
    ("arrive", lambda barrier: None, "deadlock"),
    ("init", lambda barrier, count: barrier.init(1), "deadlock|overwritten while it is read"),
    ("init", lambda barrier, count: barrier.init(2), "deadlock"),
]


@pytest.mark.parametrize(("name", "broken", "message"), BROKEN)
def test_model_notices_a_broken_barrier(
    name: str, broken: Callable[..., None], message: str
) -> None:
    q, k, v = inputs(33, 50, 2)
    with pytest.raises(AssertionError, match=message):
        run(q, k, v, programs=1, keys=8, stages=2, seed=0, **{name: broken})
