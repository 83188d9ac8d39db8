# SPDX-License-Identifier: Apache-2.0
"""The real torch-tensorrt, where its wheel is: what it takes, and that it converts our segments."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pw_engines.tensorrt.torch_tensorrt import TENSORRT_OF
from pw_runtime.execution.transformer_segments import segments_of
from tests.engines.tensorrt import coverage
from tests.engines.tensorrt.torch_tensorrt_api import known, parameters, version_of
from tests.engines.test_segments import HIGHRES

WHEELS = "PW_TORCH_TENSORRT"  # in the environment: folders of unpacked wheels, joined by ":"


def wheels() -> list[Path]:
    """Folders with the real package: named, or installed here."""
    folders = [Path(name) for name in os.environ.get(WHEELS, "").split(os.pathsep) if name]
    installed = importlib.util.find_spec("torch_tensorrt")
    if installed is not None and installed.origin is not None:
        folders.append(Path(installed.origin).parents[1])
    return folders


def test_parameters_are_known_for_every_version_that_fits() -> None:
    assert [version.rpartition(".")[0] for version in known()] == list(TENSORRT_OF)


def test_parameters_are_what_the_wheels_say() -> None:
    folders = wheels()
    if not folders:
        pytest.skip(f"needs torch-tensorrt, installed or unpacked and named by {WHEELS}")
    for folder in folders:
        version = version_of(folder)
        assert parameters(folder) == known().get(version, parameters(folder)), version


def test_every_operator_of_every_segment_has_a_converter() -> None:
    folders = [folder for folder in wheels() if (folder / "tensorrt_bindings").is_dir()]
    if not folders or shutil.which("cc") is None:
        pytest.skip(f"needs a C compiler, and torch-tensorrt with tensorrt_bindings ({WHEELS})")
    command = (sys.executable, coverage.__file__, str(folders[0]))
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    missing = json.loads(process.stdout.splitlines()[-1])
    assert missing == {name: [] for name in segments_of(HIGHRES, "bf16", 64)}
