# SPDX-License-Identifier: Apache-2.0
"""The documents speak of files that exist, and every source file has its licence line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAME = re.compile(
    r" *((?:[\w.-]+/)+[\w.-]*|[\w.-]+\.(?:py|md|txt|toml|json)|Makefile|LICENSE)(?= |$)"
)
SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCE_NAMES = {"Makefile", "CMakeLists.txt", "run"}
SOURCE_SUFFIXES = {".py", ".sh", ".cu", ".cuh", ".cpp", ".h"}


def tree_paths(text: str) -> list[str]:
    """Read the paths of a drawn tree: one name per line, children further to the right."""
    paths: list[str] = []
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = NAME.match(re.sub(r"[│├└─|`+]|--", lambda m: " " * len(m[0]), line))
        if found is None:
            continue
        while above and above[-1][0] >= found.start(1):
            above.pop()
        path = "/".join([*(name for _, name in above[-1:]), found.group(1).rstrip("/")])
        above.append((found.start(1), path))
        paths.append(path)
    return paths


INDENTED = """\
pw_runtime/
  cli.py       the verbs, e.g. doctor
               of pw
  stages/
    text.py
docs/
"""
DRAWN = """\
├── pw_runtime/
│   ├── cli.py       the verbs, e.g. doctor
│   │                of pw
│   └── stages/
│       └── text.py
└── docs/
"""
ASCII = """\
|-- pw_runtime/
|   |-- cli.py       the verbs, e.g. doctor
|   |                of pw
|   `-- stages/
|       `-- text.py
`-- docs/
"""


@pytest.mark.parametrize("text", [INDENTED, DRAWN, ASCII], ids=["indented", "drawn", "ascii"])
def test_tree_is_read_as_drawn(text: str) -> None:
    stages = "pw_runtime/stages"
    read = tree_paths(text)
    assert read == ["pw_runtime", "pw_runtime/cli/main.py", stages, f"{stages}/text.py", "docs"]


def test_every_file_of_the_readme_tree_exists(root: Path) -> None:
    blocks = FENCE.findall((root / "README.md").read_text(encoding="utf-8"))
    trees = [tree_paths(block) for block in blocks if re.search(r"^\W*pw_runtime/", block, re.M)]
    assert trees, "README.md draws no tree of the repository"
    for tree in trees:
        assert len(tree) > 5
        assert [path for path in tree if not (root / path).exists()] == []


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
