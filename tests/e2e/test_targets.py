# SPDX-License-Identifier: Apache-2.0
"""`--target` on the command line: what cannot be is refused, and nothing is built for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pw_engines.tensorrt import rtx
from tests.e2e.pw import Pw

REASON = rtx.cannot_build(())
pytestmark = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_90"), "no target sm_90 for our networks, expected sm_80, sm_86"),
        (("--target", "sm_89", "--backend", "aoti"), "--target is an option of TensorRT for RTX"),
    ],
)
def test_targets_that_cannot_be_are_refused(
    pw: Pw, bundle_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = pw("build", "--model", bundle_dir, *arguments)
    assert ended.code == 2
    assert message in ended.err


def test_the_dry_run_names_the_targets(pw: Pw, bundle_dir: Path) -> None:
    ended = pw("build", "--model", bundle_dir, "--target", "sm_89", "--dry-run")
    assert ended.code == 0
    assert "tensorrt-rtx engines for sm_89, bf16, up to 8192 tokens" in ended.err


def test_a_plan_for_engines_that_are_not_built_names_the_command(pw: Pw) -> None:
    ended = pw("plan", "--preset", "2k", "--gpu-memory", "24GiB", "--target", "sm_89")
    assert ended.code == 2
    assert "the draft network has no engines for sm_89" in ended.err
    assert "run `pw build --target sm_89`" in ended.err
