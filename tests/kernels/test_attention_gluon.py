# SPDX-License-Identifier: Apache-2.0
"""The Gluon attention kernel: its schedule on modelled barriers, its machine code for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pw_kernels.attention import reference_with_lse
from tests.closeness import max_abs
from tests.kernels.gluon_model import run

ROOT = Path(__file__).parents[2]
CASES = [(128, "bf16"), (128, "fp16"), (64, "bf16"), (64, "fp16")]
COMPILE = """
import json, re, torch
from pw_kernels.ahead_of_time import compile_variant
from pw_kernels.attention import run_kernel
from pw_kernels.launcher import recording

found = []
for width, dtype in CASES:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    q = torch.empty(111600, 24, width, dtype=kind, device="meta")
    with recording((9, 0)) as variants:
        run_kernel(q, q, q, None, True)
    built = compile_variant(*variants.values(), 90)
    sass, ptx = built.sass(), built.ptx
    arrivals = [found.start() for found in re.finditer(r"mbarrier\\.arrive\\.shared", ptx)]
    under = r"DEPBAR\\.LE gsb0, 0x1(.*?)DEPBAR\\.LE gsb0, 0x0"
    found.append({
        "fits": built.fits, "stack": built.stack_bytes, "warps": built.num_warps,
        "sass": sorted(set(re.findall(r"\\b[A-Z][A-Z0-9]{2,}\\b", sass))),
        "parameters": len(re.findall(r"\\.param .*kernel_param_\\d+,?$", ptx, re.M)),
        "exponentials": [part.count("MUFU.EX2") for part in re.findall(under, sass, re.S)],
        "arrivals": len(arrivals), "synchronised": sum(
            ptx.rfind("bar.sync", 0, at) > ptx.rfind("try_wait", 0, at) for at in arrivals
        ),
    })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """What came out, by head width and dtype."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": str(ROOT / "kernels"),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    code = f"CASES = {CASES}\n{COMPILE}"
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return dict(zip(CASES, json.loads(ran.stdout), strict=True))


each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.slow
@each_case
def test_warps_are_specialised_and_no_register_spills(
    compiled: dict[tuple[int, str], Any], case: tuple[int, str]
) -> None:
    one = compiled[case]
    assert one["fits"]
    assert one["stack"] == 0
    assert not {"LDL", "STL"} & set(one["sass"])
    assert one["warps"] == 12
    assert {"HGMMA", "UTMALDG", "USETMAXREG"} <= set(one["sass"])


@pytest.mark.slow
@each_case
def test_exponentials_are_computed_while_values_are_added(
    compiled: dict[tuple[int, str], Any], case: tuple[int, str]
) -> None:
    """Those of a tile, and two that rescale, between both waits, in the loop of each consumer."""
    assert compiled[case]["exponentials"] == [64 * 128 // 128 + 2] * 2


@pytest.mark.slow
@each_case
def test_a_slot_is_given_back_after_all_warps_have_left_the_wait(
    compiled: dict[tuple[int, str], Any], case: tuple[int, str]
) -> None:
    """One thread arrives for 128: a warp still waiting would miss the phase if it came early."""
    assert compiled[case]["arrivals"] == 2 * 5  # k, k in the loop, v in the loop, q, v
    assert compiled[case]["synchronised"] == compiled[case]["arrivals"]


@pytest.mark.slow
@each_case
def test_descriptors_are_no_parameters(
    compiled: dict[tuple[int, str], Any], case: tuple[int, str]
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
    wanted, wanted_lse = reference_with_lse(q, k, v)
    assert max_abs(out, wanted) < 1e-12
    assert max_abs(lse, wanted_lse) < 1e-5  # the reference's is fp32


BROKEN: list[tuple[str, Callable[..., None], str]] = [
    ("wait", lambda barrier, parity: None, "read before it arrived|overwritten while it is read"),
    ("arrive", lambda barrier: None, "deadlock"),
    ("init", lambda barrier, count: barrier.init(1), "deadlock|overwritten while it is read"),
    ("init", lambda barrier, count: barrier.init(2), "deadlock"),
]


@pytest.mark.parametrize(("part", "broken", "message"), BROKEN)
def test_model_notices_a_broken_barrier(
    part: str, broken: Callable[..., None], message: str
) -> None:
    q, k, v = inputs(33, 50, 2)
    with pytest.raises(AssertionError, match=message):
        run(q, k, v, programs=1, keys=8, stages=2, seed=0, **{part: broken})
