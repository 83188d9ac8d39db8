# SPDX-License-Identifier: Apache-2.0
"""Completion in Bash, by the line that docs/install.md gives for ~/.bashrc."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pw_runtime.cli.verbs import cli
from pw_runtime.presets import PRESETS

BASH = shutil.which("bash")
ROOT = Path(__file__).parents[2]
PW = """#!/bin/sh
exec {python} -c 'import sys; sys.argv[0] = "pw"; from pw_runtime.cli.main import main; main()' "$@"
"""


@pytest.mark.skipif(BASH is None, reason="there is no Bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("gen",), ["generate"]),
        (("",), sorted(cli.commands)),
        (("generate", "--set-"), []),
        (("generate", "--pres"), ["--preset"]),
        (("generate", "--preset", ""), list(PRESETS)),
        (("plan", "--preset", "4K"), ["4k", "4k-5step", "4k-portrait", "4k-square"]),
        (("engines", "ver"), ["verify"]),
        (("generate", "--codec", "h"), ["h264", "hevc"]),
    ],
)
def test_bash_completes_by_the_line_of_the_documentation(
    words: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    program = tmp_path / "pw"
    program.write_text(PW.format(python=shlex.quote(sys.executable)))
    program.chmod(0o755)
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(eval [^`]*_PW_COMPLETE=bash_source[^`]*)` in\s`~/.bashrc`", page)
    typed = shlex.join(["pw", *words])
    script = f"""{line}
COMP_WORDS=({typed}); COMP_CWORD={len(words)}
_pw_completion pw
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    assert BASH is not None
    run = subprocess.run(
        [BASH, "--norc", "-c", script],
        env={
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    assert run.stdout.split() == expected
