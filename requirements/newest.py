# SPDX-License-Identifier: Apache-2.0
"""Print what is installed here in another version than the lock says: name, locked, newest.

`make test-latest` runs this in its own environment: python requirements/newest.py torch==2.13.0
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parent / "dev.txt"
NEVER_LOCKED = {"pip", "pixelwizard-runtime"}


def locked_versions(lock: str) -> dict[str, str]:
    """Return the version of each package that the lock holds for this Python and platform."""
    entries = (line.rstrip("\\") for line in lock.splitlines() if line[:1].isalnum())
    requirements = [Requirement(entry) for entry in entries]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).lstrip("=")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def installed_versions() -> dict[str, str]:
    """Return the version of each distribution that is installed, without its build ("+cpu")."""
    versions = {canonicalize_name(item.name): item.version for item in distributions()}
    return {
        name: version.partition("+")[0]
        for name, version in versions.items()
        if name not in NEVER_LOCKED
    }


def changes(locked: dict[str, str], installed: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return name, locked and installed version of every package that differs, sorted by name.

    A dash stands for a version that is absent: a package that only one of the two has.
    """
    names = sorted(locked.keys() | installed.keys())
    rows = [(name, locked.get(name, "-"), installed.get(name, "-")) for name in names]
    return [row for row in rows if row[1] != row[2]]


def main() -> None:
    """Print a table of the differences and their number."""
    locked = locked_versions("\n".join([LOCK.read_text(encoding="utf-8"), *sys.argv[1:]]))
    rows = changes(locked, installed_versions())
    for name, old, new in [("package", "locked", "newest"), *rows]:
        print(f"{name:28} {old:20} {new}")
    print(f"packages that differ from the lock: {len(rows)}")


if __name__ == "__main__":
    main()
