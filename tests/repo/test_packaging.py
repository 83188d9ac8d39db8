# SPDX-License-Identifier: Apache-2.0
"""What is built is what is in the tree, and it runs where the tree is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PACKAGES = (
    "pw_runtime",
    "kernels/pw_kernels",
    "export/pw_export",
    "engines/pw_engines",
    "bench/pw_bench",
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def build(root: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable, "-m", "pip", "wheel", root, "--no-deps", "--no-build-isolation", "-w", out,
        cwd=out, **environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = build(root, out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment that has the wheel and sees this one's dependencies. A path in
    a .pth file does not bring that folder's own .pth files: an editable install stays unseen."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    where = run(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=folder,
    )  # fmt: skip
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(where.stdout.strip(), "dependencies.pth").write_text("\n".join(sorted(ours)) + "\n")
    installed = run(
        sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps",
        "--ignore-installed", wheel, cwd=folder,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return programs


def test_wheel_is_pure_and_holds_the_five_packages_whole(
    wheel: Path, root: Path, files: list[Path]
) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in names if ".dist-info/" in name}
    wanted = {
        str(file.relative_to(Path(package).parent))
        for package in PACKAGES
        for file in files
        if file.is_relative_to(package)
    }
    pages = {name for name in names if name.startswith("pw_runtime/docs/")}
    assert names - info - pages == wanted
    assert "pw_runtime/data/demo_prompts.txt" in names
    assert "pw_runtime/server/page/index.html" in names
    assert "pw_export/nano/trained/highres.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_wheel_states_its_licence_python_and_program(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    metadata = message_from_string(texts["METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Author"]
    assert metadata["Keywords"]
    addresses = [line.partition(", ")[2] for line in metadata.get_all("Project-URL", [])]
    assert addresses
    assert all(address.startswith("https://") for address in addresses)
    programs = ConfigParser()
    programs.read_string(texts["entry_points.txt"])
    assert dict(programs["console_scripts"]) == {"pw": "pw_runtime.cli.main:main"}


def test_description_shows_everything_it_refers_to(wheel: Path) -> None:
    """An index has neither the repository's files nor its pictures."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert isinstance(text, str)
    assert "pw demo" in text
    assert re.findall(r"\]\((?!https:)[^)]*\)", text) == []


def test_wheel_holds_every_page_and_nothing_else_of_docs(wheel: Path, files: list[Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("pw_runtime/docs/")}
    written = [file for file in files if file.is_relative_to("docs") and file.suffix == ".md"]
    assert names == {f"pw_runtime/{file}" for file in written if "reference" not in file.parts}


def test_installed_packages_do_not_come_from_the_tree(clean_bin: Path, tmp_path: Path) -> None:
    names = ", ".join(Path(package).name for package in PACKAGES)
    code = f"import {names}; print(*(m.__file__ for m in ({names})), sep='\\n')"
    found = run(clean_bin / "python", "-c", code, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for path in found.stdout.splitlines():
        assert Path(path).is_relative_to(clean_bin.parent)


def test_installed_program_runs_from_anywhere(clean_bin: Path, tmp_path: Path) -> None:
    asked = run(clean_bin / "pw", "--help", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    for verb in ("generate", "convert", "doctor"):
        assert verb in asked.stdout
    page = run(clean_bin / "pw", "docs", "presets", cwd=tmp_path)
    assert page.stdout.startswith("# Presets\n"), page.stderr
    report = run(clean_bin / "pw", "doctor", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "pw generate: ready on " in report.stdout.splitlines()[-1]


def test_installed_data_is_found(clean_bin: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files;"
        "print(files('pw_runtime').joinpath('data', 'demo_prompts.txt').read_text())"
    )
    found = run(clean_bin / "python", "-c", code, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split("\n")) == 8  # six prompts, the file's end, print's end


def test_compiled_kernels_are_in_the_wheel_that_asked_for_them(root: Path, tmp_path: Path) -> None:
    """One kernel for one architecture: all of them take minutes."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    only = {"PW_ARCHS": "90", "PW_KERNELS": "norm_modulate"}
    defined = ";".join(f"{name}={value}" for name, value in only.items())
    built = build(root, tmp_path, PW_BUILD_CUDA="1", SKBUILD_CMAKE_DEFINE=defined)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "pw_kernels/_native/libpw_kernels.so" in archive.namelist()
    where = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where)
    code = "import pw_kernels.library as one; print(one.__file__, one.status())"
    # -S: the editable install of this tree would come before any path
    path = f"{where}:{sysconfig.get_path('purelib')}"
    found = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert found.returncode == 0, found.stderr
    assert f"{where}/pw_kernels/library.py compiled library {where}/pw_kernels" in found.stdout
    assert found.stdout.endswith(" kernels for sm_90\n")
