# SPDX-License-Identifier: Apache-2.0
"""Two commands set everything up, from lock files that agree with pyproject.toml."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
LOCKS = ("runtime.txt", "dev.txt")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def makefile(root: Path) -> str:
    return (root / "Makefile").read_text(encoding="utf-8")


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """Where nothing is installed: what `make` reads, and nothing else."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "requirements"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    return tmp_path


def make(clone: Path, *arguments: str) -> str:
    """Run `make` and return what it printed."""
    run = subprocess.run(
        ["make", *arguments], cwd=clone, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def entries(lock: str) -> dict[str, str]:
    """Return each package's whole entry, hashes included, by its normalised name."""
    blocks = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    return {canonicalize_name(block.partition("==")[0]): block for block in blocks}


def version(entry: str) -> str:
    """Return the one version that an entry pins."""
    (specifier,) = Requirement(entry.partition("\\")[0]).specifier
    assert specifier.operator == "=="
    return specifier.version


def declared_in(project: dict[str, Any], lock: str) -> list[str]:
    """Return the requirements that pyproject.toml states for what a lock file sets up."""
    declared = project["project"]["dependencies"] + project["build-system"]["requires"]
    return declared + extra_of(project, "dev") if lock == "dev.txt" else declared


def extra_of(project: dict[str, Any], name: str) -> list[str]:
    """Return the requirements of an extra, with those of the extras that it names."""
    found: list[str] = []
    for line in project["project"]["optional-dependencies"][name]:
        requirement = Requirement(line)
        if requirement.name == project["project"]["name"]:
            found += [item for extra in requirement.extras for item in extra_of(project, extra)]
        else:
            found.append(line)
    return found


def closure(requirements: list[str]) -> set[str]:
    """Return the names of all distributions that these need, as they are installed here."""
    todo, done = [(item, "") for item in requirements], set[tuple[str, str]]()
    while todo:
        item, extra_of = todo.pop()
        requirement = Requirement(item)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra_of}):
            continue
        for extra in {"", *requirement.extras}:
            node = (canonicalize_name(requirement.name), extra)
            if node not in done:
                done.add(node)
                todo += [(line, extra) for line in distribution(node[0]).requires or ()]
    return {name for name, _ in done}


def script(root: Path, name: str) -> ModuleType:
    """Import one of the programs beside the lock files."""
    spec = importlib.util.spec_from_file_location(name, root / "requirements" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_every_dependency_in_its_range(
    lock: str, root: Path, project: dict[str, Any], makefile: str
) -> None:
    (torch,) = re.findall(r"^TORCH \?= torch==([\d.]+)$", makefile, re.MULTILINE)
    pinned = {"torch": torch} | {
        name: version(entry)
        for name, entry in entries((root / "requirements" / lock).read_text()).items()
    }
    wrong = [
        f"{requirement}: {pinned.get(canonicalize_name(requirement.name))}"
        for requirement in map(Requirement, declared_in(project, lock))
        if pinned.get(canonicalize_name(requirement.name), "") not in requirement.specifier
    ]
    assert wrong == []


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_what_the_dependencies_require_and_no_more(
    lock: str, root: Path, project: dict[str, Any]
) -> None:
    """A package that nothing requires any more stayed in the lock: psutil."""
    newest = script(root, "newest")
    locked = newest.locked_versions((root / "requirements" / lock).read_text(encoding="utf-8"))
    installed = newest.installed_versions()
    if any(installed.get(name) != version for name, version in locked.items()):
        pytest.skip("needs the locked versions, as `make` installs them")
    unlocked = re.compile(r"torch$|nvidia-|cuda-")
    required = {name for name in closure(declared_in(project, lock)) if not unlocked.match(name)}
    if lock == "runtime.txt":
        required.discard("triton")  # comes with torch's CUDA build
    assert locked.keys() == required


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_its_hashes_and_no_address(lock: str, root: Path) -> None:
    text = (root / "requirements" / lock).read_text(encoding="utf-8")
    without = [name for name, entry in entries(text).items() if not HASH.search(entry)]
    assert without == []
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.parametrize("lock", LOCKS)
def test_what_depends_on_torchs_build_is_not_locked(lock: str, root: Path) -> None:
    names = entries((root / "requirements" / lock).read_text(encoding="utf-8"))
    assert [name for name in names if re.match(r"(torch$|nvidia-|cuda-)", name)] == []


def test_both_locks_hold_the_same_versions(root: Path) -> None:
    runtime, dev = (entries((root / "requirements" / lock).read_text()) for lock in LOCKS)
    assert {name: version(entry) for name, entry in runtime.items()} == {
        name: version(dev[name]) for name in runtime
    }


def test_lock_is_made_for_a_release_of_the_default_index(root: Path) -> None:
    program = root / "requirements" / "lock.py"
    run = subprocess.run(
        [sys.executable, program, "torch==2.13.0+cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "got: torch==2.13.0+cpu" in run.stderr


def test_lock_leaves_out_whole_entries(root: Path) -> None:
    lock = script(root, "lock")
    hashes = " \\\n    --hash=sha256:0\n"
    kept = "torchtitan==1" + hashes, "nvidia==1" + hashes, "zipp==1" + hashes
    cut = "cuda-toolkit==13 ; sys_platform == 'linux'" + hashes, "torch==2" + hashes
    text = "".join((kept[0], cut[0], kept[1], cut[1], kept[2]))
    assert lock.without(text, lock.ONLY_FOR_CUDA) == "".join(kept)


def test_newest_tells_changed_added_and_removed_packages(root: Path) -> None:
    newest = script(root, "newest")
    lock = (
        "# a comment\n"
        "NumPy==1.0 \\\n    --hash=sha256:0\n"
        "same==3 \\\n    --hash=sha256:0\n"
        "gone==2 ; python_full_version >= '3' \\\n    --hash=sha256:0\n"
        "elsewhere==1 ; sys_platform == 'no such system' \\\n    --hash=sha256:0\n"
    )
    locked = newest.locked_versions(lock)
    assert locked == {"numpy": "1.0", "same": "3", "gone": "2"}
    assert newest.changes(locked, {"numpy": "1.1", "same": "3", "new": "7"}) == [
        ("gone", "2", "-"),
        ("new", "-", "7"),
        ("numpy", "1.0", "1.1"),
    ]


def test_every_target_that_a_document_names_exists(root: Path, clone: Path) -> None:
    documents = ("README.md", "CONTRIBUTING.md", "Makefile", ".github/workflows/ci.yml", ".ci/run")
    call = re.compile(r"(?:^|`|#\s+|run: )make ([a-z][a-z-]*)", re.MULTILINE)
    texts = [(root / name).read_text(encoding="utf-8") for name in documents]
    targets = {target for text in texts for target in call.findall(text)}
    assert targets >= {"demo", "test", "fix", "check", "quick", "test-latest", "lock", "wheel"}
    for target in sorted(targets):
        make(clone, "--dry-run", target)


@pytest.mark.parametrize(("target", "lock"), [("demo", "runtime.txt"), ("test", "dev.txt")])
def test_set_up_installs_from_one_lock_with_hashes(target: str, lock: str, clone: Path) -> None:
    lines = [line for line in make(clone, "--dry-run", target).splitlines() if " install " in line]
    locked, torch, project = (line.partition(" install --quiet ")[2] for line in lines)
    assert locked == f"--no-deps --require-hashes --requirement requirements/{lock}"
    assert re.fullmatch(r"torch==[\d.]+", torch)
    assert project == "--no-deps --no-build-isolation --editable ."


def test_newest_versions_are_tested_apart(clone: Path) -> None:
    commands = make(clone, "--dry-run", "test-latest")
    assert ".venv-latest/bin/python -m pytest" in commands
    assert ".venv/" not in commands


def test_quick_runs_tests_that_exist(root: Path, clone: Path) -> None:
    command = make(clone, "--dry-run", "quick").partition(" -m pytest ")[2]
    paths = [word for word in command.split() if word.startswith("tests/")]
    assert len(paths) > 3
    assert [path for path in paths if not (root / path).exists()] == []


def test_another_torch_is_noticed(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "pyvenv.cfg").touch()
    stamp = clone / ".venv" / "torch.txt"
    make(clone, ".venv/torch.txt", "TORCH=torch==1.0")
    first = stamp.stat().st_mtime_ns
    make(clone, ".venv/torch.txt", "TORCH=torch==1.0")
    assert stamp.stat().st_mtime_ns == first
    make(clone, ".venv/torch.txt", "TORCH=torch==1.1")
    assert stamp.read_text() == "torch==1.1\n"


def test_python_versions_are_stated_alike(root: Path, project: dict[str, Any]) -> None:
    allowed = SpecifierSet(project["project"]["requires-python"])
    classifiers = project["project"]["classifiers"]
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    assert stated
    assert all(python in allowed for python in stated)
    assert str(allowed) == f">={stated[0]}"
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'"(3\.\d+)"', workflow)) <= set(stated)


def test_commit_hooks_run_the_tools_of_make_check(root: Path, clone: Path) -> None:
    commands = make(clone, "--dry-run", "check").splitlines()
    tools = {line for line in commands if re.match(r"\.venv/bin/(ruff|mypy|lint-imports)", line)}
    assert len(tools) == 4
    hooks = (root / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"entry: (.+)", hooks)) == tools


def test_every_dependency_has_its_reason(root: Path, project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"].values()
    declared = project["project"]["dependencies"] + [item for extra in extras for item in extra]
    names = {Requirement(item).name for item in declared + project["build-system"]["requires"]}
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([a-z][^|]+) \| [^|]+ \|$", text, re.MULTILINE)
    rows = {name for row in table for name in re.sub(r"\(.*?\)|,", " ", row).split()}
    assert rows - {"package"} == names - {project["project"]["name"]}
