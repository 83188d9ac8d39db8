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
        (
            ("--blocks", "whole", "--preset", "nano", "--precision", "fp32"),
            "--blocks whole computes attention inside engines, where bf16 alone has kernels",
        ),
        (("--blocks", "whole"), "engines that take all tokens of a clip at once"),
        (("--blocks", "attention", "--backend", "aoti", "--preset", "nano"), "is for TensorRT for"),
        *(
            ((*option, "--onnx-only", "models"), f"--onnx-only and {option[0]} contradict")
            for option in (
                ("--blocks", "whole"),
                ("--target", "sm_89"),
                ("--backend", "aoti"),
                ("--jobs", "2"),
            )
        ),
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


@pytest.mark.parametrize("blocks", ["attention", "whole"])
def test_engines_with_attention_inside_are_those_of_the_preset(
    pw: Pw, bundle_dir: Path, blocks: str
) -> None:
    options = ("--target", "sm_89", "--dry-run", "--blocks", blocks, "--preset", "nano")
    ended = pw("build", "--model", bundle_dir, *options)
    assert ended.code == 0
    assert f"blocks as {blocks}: for clips of this preset only" in ended.err
    name = "attention" if blocks == "attention" else "block"
    engines = [line.split("-")[0].strip() for line in ended.err.splitlines() if "-rtx-" in line]
    assert engines.count(name) == 2  # of the draft and of the high-res picture
    assert ("block_in" in engines) == (blocks == "attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp32"), "where bf16 alone has kernels"),
        (("--precision", "bf16"), "TensorRT for RTX runs on NVIDIA GPUs, got the device cpu"),
    ],
)
def test_a_run_that_cannot_have_attention_inside_engines_is_refused(
    pw: Pw, bundle_dir: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    arguments = ("--model", bundle_dir, "--preset", "nano", "--prompt", "a cat", "--device", "cpu")
    ended = pw("generate", *arguments, "--out", tmp_path / "out", "--blocks", "whole", *options)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--blocks whole is planned with engines that were built"),
        (("--target", "sm_89"), "run `pw build --target sm_89 --blocks whole --preset 2k`"),
        (("--target", "sm_89", "--precision", "fp32"), "where bf16 alone has kernels"),
    ],
)
def test_a_plan_of_whole_blocks_says_what_it_needs(
    pw: Pw, options: tuple[str, ...], message: str
) -> None:
    ended = pw("plan", "--preset", "2k", "--gpu-memory", "24GiB", "--blocks", "whole", *options)
    assert ended.code == 2
    assert message in ended.err


def test_a_plan_for_engines_that_are_not_built_names_the_command(pw: Pw) -> None:
    ended = pw("plan", "--preset", "2k", "--gpu-memory", "24GiB", "--target", "sm_89")
    assert ended.code == 2
    assert "blocks as segments: not built (draft network, embed: not built yet)" in ended.out
    assert "there are no engines for sm_89" in ended.err
    assert "run `pw build --target sm_89`" in ended.err
