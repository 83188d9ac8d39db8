# SPDX-License-Identifier: Apache-2.0
"""Renew `runtime.txt` and `dev.txt`: the newest versions that pyproject.toml allows, with hashes.

`make lock` runs this with uv installed. One version serves every Python and platform where that
is possible, so what was tested on one is what the others install. torch is resolved but not
locked: the Makefile installs it on its own, because machines differ in the build they take
(CPU, CUDA, ROCm) and each build has another hash. What only a CUDA build of torch requires is
left out for the same reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
HEADER = "# Made by `make lock`; do not edit. torch is not here: the Makefile installs it.\n"
ENTRY = re.compile(r"^(?=[\w.-]+==)", re.MULTILINE)
ONLY_FOR_CUDA = re.compile(r"(torch|nvidia-[\w.-]+|cuda-[\w.-]+)==")


def resolve(torch: str, *arguments: str) -> str:
    """Return the requirements, hashes included, of the project and its build back end."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "-", "--quiet",
        "--universal", "--python-version", project["project"]["requires-python"].lstrip(">="),
        "--fork-strategy", "fewest", "--generate-hashes", "--no-header", "--no-annotate",
        *arguments,
    ]  # fmt: skip
    extra = "\n".join([torch, *project["build-system"]["requires"]])
    run = subprocess.run(
        command,
        cwd=FOLDER.parent,
        input=extra,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return run.stdout


def without(requirements: str, unwanted: re.Pattern[str]) -> str:
    """Return the requirements without the entries that `unwanted` matches."""
    entries = ENTRY.split(requirements)
    return "".join(entry for entry in entries if not unwanted.match(entry))


def main() -> None:
    """Write both files for the torch release named on the command line."""
    (torch,) = sys.argv[1:]
    if not re.fullmatch(r"torch==[\w.]+", torch):
        sys.exit(
            "the lock is made for one release of torch from the default index\n"
            f"  got: {torch}\n  expected: torch==VERSION\n  do this: make lock"
        )
    dev = without(resolve(torch, "--extra", "dev"), ONLY_FOR_CUDA)
    (FOLDER / "dev.txt").write_text(HEADER + dev, encoding="utf-8")
    # why constraints: a package has the same version in both files
    runtime = resolve(torch, "--constraints", "requirements/dev.txt")
    # why triton: the runtime takes it from torch, if that is a CUDA build
    unwanted = re.compile(rf"{ONLY_FOR_CUDA.pattern}|triton==")
    (FOLDER / "runtime.txt").write_text(HEADER + without(runtime, unwanted), encoding="utf-8")


if __name__ == "__main__":
    main()
