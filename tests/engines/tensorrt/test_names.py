# SPDX-License-Identifier: Apache-2.0
"""Every name of TensorRT that we use is there from 10.8 to 11.4, and in TensorRT for RTX."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from pw_engines.tensorrt.library import RTX, bindings
from tests.engines.tensorrt.bindings import introspect_elsewhere, introspect_rtx, version_of
from tests.engines.tensorrt.names import MANIFEST, RTX_ONLY, manifest, rtx_manifest, table, used

WHEELS = "PW_TENSORRT_BINDINGS"  # in the environment: folders of unpacked wheels, joined by ":"


def wheels() -> list[Path]:
    """Folders with the real bindings: named, or installed here."""
    folders = [Path(name) for name in os.environ.get(WHEELS, "").split(os.pathsep) if name]
    installed = importlib.util.find_spec("tensorrt_bindings")
    if installed is not None and installed.origin is not None:
        folders.append(Path(installed.origin).parents[1])
    return folders


def test_manifest_is_of_the_oldest_to_the_newest_version() -> None:
    assert list(manifest()) == ["10.8.0.43", "10.16.1.11", "11.0.0.114", "11.4.0.106"]
    assert MANIFEST.stat().st_size < 60_000


@pytest.mark.parametrize("version", manifest())
def test_every_name_we_use_exists(version: str) -> None:
    known = manifest()[version]
    uses = {name: places for name, places in used().items() if name not in RTX_ONLY}
    missing = {name: places for name, places in uses.items() if name not in known}
    assert missing == {}


def test_every_name_we_use_exists_in_tensorrt_for_rtx() -> None:
    (known,) = rtx_manifest().values()
    missing = {name: places for name, places in used().items() if name not in known}
    assert missing == {}
    assert used().keys() >= RTX_ONLY


def test_the_rtx_manifest_is_what_the_installed_bindings_say() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    version, here = bindings(RTX).__version__, introspect_rtx()
    if version in rtx_manifest():
        assert here == rtx_manifest()[version]
    else:  # a later one: what we use must be there
        assert used().keys() <= here.keys()


def test_the_walk_finds_what_is_used() -> None:
    names = used()
    assert len(names) > 50
    for name in (
        "Builder.__init__",
        "BuilderFlag.TF32",
        "IExecutionContext.execute_async_v3",
        "ILogger.Severity.WARNING",
        "ParserError.node_name",
        "Runtime.deserialize_cuda_engine",
    ):
        assert names[name], name


def test_the_walk_finds_what_does_not_exist(tmp_path: Path) -> None:
    source = tmp_path / "tensorrt_new.py"
    source.write_text(
        "config.set_flag(trt.BuilderFlag.FP16)\nself._engine.device_memory_size\n"
        "with_weights = trt.Refitter(engine, logger)\n"
    )
    unknown = used([source]).keys() - manifest()["11.0.0.114"].keys()
    assert unknown == {
        "BuilderFlag.FP16",
        "IBuilderConfig.set_flag",
        "ICudaEngine.device_memory_size",
        "Refitter.__init__",
    }


def test_table_lists_name_and_versions() -> None:
    lines = table().splitlines()
    assert lines[0].split() == ["name", *manifest(), *rtx_manifest()]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert all(marks[-1] == "yes" for marks in rows.values())
    assert all(marks == ["yes"] * 5 for name, marks in rows.items() if name not in RTX_ONLY)


def test_manifest_is_what_the_real_bindings_say() -> None:
    folders = wheels()
    if not folders:
        pytest.skip(f"needs the bindings of TensorRT, installed or unpacked and named by {WHEELS}")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    known = manifest()
    for folder in folders:
        version = version_of(folder)
        if version not in known:  # an installed one may be any: what we use must be there
            assert used().keys() <= introspect_elsewhere(folder).keys(), version
        else:
            assert introspect_elsewhere(folder) == known[version], version
