# SPDX-License-Identifier: Apache-2.0
"""Engines with quantized linear layers are refused, before they are built, where none could run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pw_engines import EngineStore
from pw_engines.tensorrt import rtx
from pw_export.build_jobs import TransformerSource, jobs_for, platform_for
from pw_export.linear_formats import able, require_buildable
from pw_runtime.errors import BadRequest
from pw_runtime.types import LinearFormat
from tests.networks import TINY_DRAFT

CPU = torch.device("cpu")
REASON = rtx.cannot_build(())
needs_rtx = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@needs_rtx
@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize(
    ("linear", "targets", "unable", "remedy"),
    [
        ("fp8", ("sm_86", "sm_89"), "sm_86 has", "--target sm_89 --target sm_120 --target sm_121;"),
        ("nvfp4", ("sm_80", "sm_89"), "sm_80, sm_89 has", "build for --target sm_120 --target"),
    ],
)
def test_targets_without_the_format_are_refused_with_those_that_have_it(
    linear: LinearFormat, targets: tuple[str, ...], unable: str, remedy: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        platform_for("tensorrt-rtx", CPU, targets, linear)
    assert f"{unable} no products of {linear} numbers" in str(caught.value)
    assert remedy in str(caught.value)


@needs_rtx
@pytest.mark.tensorrt_rtx
def test_all_targets_that_have_the_format_by_default() -> None:
    everywhere: tuple[LinearFormat, ...] = ("exact", "int8", "int8-weight")
    for linear in everywhere:
        assert dict(platform_for("tensorrt-rtx", CPU, (), linear))["targets"] == " ".join(
            rtx.RTX.targets
        )
    fp8 = dict(platform_for("tensorrt-rtx", CPU, (), "fp8"))
    assert fp8["targets"] == "sm_89 sm_120 sm_121"
    assert able("nvfp4", rtx.RTX.targets) == ("sm_120", "sm_121")


def test_plain_tensorrt_is_asked_for_the_gpu_it_builds_on() -> None:
    least: dict[LinearFormat, str] = {"int8": "8.0", "fp8": "9.0", "nvfp4": "10.0"}
    for linear, capability in least.items():
        require_buildable(linear, "tensorrt", (("capability", capability),))
    with pytest.raises(BadRequest, match="sm_90 has no products of nvfp4 numbers"):
        require_buildable("nvfp4", "tensorrt", (("capability", "9.0"),))


def test_compilers_without_the_format_are_refused() -> None:
    platform_for("aoti", CPU, (), "int8")
    with pytest.raises(BadRequest, match="aoti builds no engines with fp8 linear layers"):
        platform_for("aoti", CPU, (), "fp8")
    with pytest.raises(BadRequest, match="torch-tensorrt builds no engines with int8"):
        require_buildable("int8", "torch-tensorrt", ())


def test_the_key_of_an_engine_has_the_format(tmp_path: Path) -> None:
    def folders(linear: LinearFormat) -> set[str]:
        source = TransformerSource(TINY_DRAFT, "fp32", 48, linear=linear)
        store, platform = EngineStore(tmp_path), platform_for("aoti", CPU)
        jobs, _ = jobs_for([source], "aoti", CPU, store, platform)
        return {job.key.folder for job in jobs}

    assert folders("exact") < folders("int8")
    added = folders("int8") - folders("exact")
    assert {name.rsplit("-", 2)[0] for name in added} == {"block_in_int8", "block_out_int8"}
