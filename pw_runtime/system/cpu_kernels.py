# SPDX-License-Identifier: Apache-2.0
"""The C++ of pw_kernels for CPUs: compiled at its first use on a machine, then kept in the cache.

It is not compiled into the wheel, which stays one for all platforms and needs no compiler. The
compiler is the one that `pw build` needs anyway, and makes what this CPU runs and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pw_engines.trust import foreign
from pw_kernels import cpu_library
from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.system.atomic_files import atomic_file
from pw_runtime.system.machine import cpp_compiler
from pw_runtime.system.places import cache_root
from pw_runtime.system.trusted_folder import trusted_folder

_SECONDS = 300  # that a compiler gets


def library_file() -> Path:
    """Return where the compiled library is, or would be."""
    return cache_root() / "cpu" / cpu_library.file_name()


def open_cpu_kernels(say: Callable[[str], None]) -> str | None:
    """Open the CPU kernels; compile them if this machine has not done so yet.

    Args:
        say: told about a compilation.

    Returns:
        Why they cannot be used here, or None.
    """
    if reason := cpu_library.unavailable():
        return reason
    path = library_file()
    try:
        trusted_folder(path.parent)
        if not path.exists():
            _compile(path, say)
        if fault := foreign(path):
            return f"{path} is not trusted: {fault}"
        cpu_library.open_library(path)
    except (BadRequest, WriteFailed, _CompilerFailed) as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be loaded ({error}): remove it"
    return None


class _CompilerFailed(Exception):
    pass


def _compile(path: Path, say: Callable[[str], None]) -> None:
    """Compile the library. Raises _CompilerFailed, WriteFailed."""
    compiler = cpp_compiler()
    if shutil.which(compiler) is None:
        raise _CompilerFailed(f"there is no C++ compiler {compiler}: install it, or set CXX")
    say(f"compiling the CPU kernels with {compiler}, once")
    start = time.perf_counter()
    with atomic_file(path) as partial:
        command = cpu_library.compile_command(compiler, partial)
        try:
            run = subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_SECONDS,
                env={**os.environ, "LC_ALL": "C"},
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise _CompilerFailed(f"{compiler} does not run: {error}") from error
        if run.returncode != 0 or not partial.exists():
            lines = [line for line in run.stderr.splitlines() if "error" in line.lower()]
            first = (lines or run.stderr.splitlines() or [f"exit code {run.returncode}"])[0]
            raise _CompilerFailed(f"{compiler} failed: {first[:300]}")
    say(f"compiled in {time.perf_counter() - start:.1f} s: {path}")


def status() -> str:
    """Describe in one line what convolutions on this CPU run on, without compiling anything."""
    if reason := cpu_library.unavailable():
        return f"onednn: {reason}"
    path = library_file()
    if path.exists():
        return f"winograd, {path}"
    if shutil.which(cpp_compiler()) is None:
        return f"onednn: there is no C++ compiler {cpp_compiler()} for winograd"
    return "winograd, to be compiled at the first use"
