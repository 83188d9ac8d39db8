# SPDX-License-Identifier: Apache-2.0
"""The documents speak of files that exist, and every source file has its licence line."""

from __future__ import annotations

import re
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ROOM = re.compile(r"^(?:#+|\s*[-*]) .*", re.MULTILINE)
PACKAGES = (
    "pw_runtime",
    "kernels/pw_kernels",
    "engines/pw_engines",
    "export/pw_export",
    "bench/pw_bench",
)
SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCE_NAMES = {"Makefile", "CMakeLists.txt", "run"}
SOURCE_SUFFIXES = {".py", ".sh", ".cu", ".cuh", ".cpp", ".h"}


def test_every_package_folder_is_described(root: Path, files: list[Path]) -> None:
    """docs/structure.md has a heading or bullet for each: `pw_runtime/planning`."""
    text = (root / "docs" / "structure.md").read_text(encoding="utf-8")
    named = {
        path.rstrip("/") for line in ROOM.findall(text) for path in re.findall("`(.+?)`", line)
    }
    rooms = {
        file.parent.relative_to(Path(package).parent).as_posix()
        for package in PACKAGES
        for file in files
        if file.name == "__init__.py" and file.is_relative_to(package)
    }
    assert len(rooms) > len(PACKAGES)
    assert rooms - named == set()


def test_every_path_in_the_structure_exists(root: Path) -> None:
    text = (root / "docs" / "structure.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`([\w./-]+)`", text) if path.startswith("pw_")}
    parents = [root / package / ".." for package in PACKAGES]
    gone = [path for path in paths if not any((parent / path).exists() for parent in parents)]
    assert gone == []


def test_every_relative_link_resolves(root: Path, files: list[Path]) -> None:
    dead = []
    for file in (f for f in files if f.suffix == ".md"):
        for target in LINK.findall((root / file).read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:|#", target):
                continue
            if not (root / file.parent / target.partition("#")[0]).exists():
                dead.append(f"{file}: {target}")
    assert dead == []


def test_every_source_file_has_its_licence_line(root: Path, files: list[Path]) -> None:
    kinds = [f for f in files if f.suffix in SOURCE_SUFFIXES or f.name in SOURCE_NAMES]
    sources = [f for f in kinds if (root / f).stat().st_size]
    assert len(sources) > 20
    without = [str(f) for f in sources if SPDX not in (root / f).read_text(encoding="utf-8")[:200]]
    assert without == []
