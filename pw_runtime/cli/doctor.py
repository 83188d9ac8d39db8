# SPDX-License-Identifier: Apache-2.0
"""The report of `pw doctor`: what is there, what is missing, what that disables, what mends it.

Imports the standard library alone: anything else may be missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pw_runtime.cli.json_output import json_text
from pw_runtime.errors import BadRequest
from pw_runtime.system.forked import run_forked
from pw_runtime.system.input_files import UnreadableInput, read_json
from pw_runtime.system.machine import Machine, cpp_compiler, cpu_features, describe
from pw_runtime.system.packages import (
    BASE,
    DEVELOPMENT,
    KNOWN,
    Package,
    declared,
    pip_install,
)
from pw_runtime.system.places import MEASURED, cache_root, check_cache, free_bytes, temporary_folder
from pw_runtime.system.printable import printable

NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16"})  # as Linux names them


def report(*, as_json: bool = False) -> str:
    """Look at this machine, which takes seconds, and describe it, in words or as JSON.

    A forked process imports the packages, as a broken one may end the process that imports it.
    """
    described = _json if as_json else doctor_report
    if "torch" in sys.modules:  # nothing to protect, and its threads do not survive a fork
        return described(describe())
    fatal: dict[str, str] = {}
    while True:
        ended = run_forked(lambda note: described(describe(fatal, note)))
        if ended.result is not None:
            return ended.result
        if ended.note is None or ended.note in fatal:
            raise RuntimeError(f"the process that looks at this machine ended: {ended.how}")
        fatal[ended.note] = ended.how


def _json(machine: Machine) -> str:
    from pw_runtime.cli.doctor_document import doctor_document

    return json_text(doctor_document(machine))


def _bf16() -> str:
    """Say whether the CPU has instructions for products in bf16."""
    has = cpu_features() & NATIVE_BF16
    return f"bf16 by {', '.join(sorted(has))}" if has else "no bf16 arithmetic: keep to fp32"


def doctor_report(machine: Machine) -> str:
    """Say what is installed, what is missing, broken or outside the supported range, what that
    disables and which command fixes it. The last line tells whether `pw generate` can run."""
    groups = declared()
    installed = {package.name: package for package in machine.packages}
    lines = [
        f"python     {machine.python}",
        f"system     {machine.os}",
        f"cpu        {machine.cpu}, {machine.cores} cores, {_bf16()}",
        f"memory     {_gib(machine.memory_bytes)}",
        *(f"gpu        {g.name}, {_gib(g.memory_bytes)}, sm {g.capability}" for g in machine.gpus),
        *([] if machine.gpus else ["gpu        none that torch can use"]),
        *(f"attention  {line}" for line in _measured({gpu.name for gpu in machine.gpus})),
        f"driver     {machine.driver or 'unknown'}",
        f"compiler   {compiler_text()}",
        f"conv       {conv_text() if is_usable(installed.get('torch')) else _unusable('torch')}",
        f"encoders   {encoders_text() if is_usable(installed.get('av')) else _unusable('av')}",
        f"cache      {_cache()}",
        f"temporary  {_temporary()}",
        "",
        f"{'state':<8} {'package':<15} {'version':<16} needed for",
    ]
    for name in [*installed, *(name for name in groups[BASE] if name not in installed)]:
        package = installed.get(name, Package(name=name, version=None))
        extras = [f"[{extra}]" for extra in groups if extra != BASE and name in groups[extra]]
        purpose = "everything" if name in groups[BASE] else ", ".join(_without_dev(extras))
        group = next((group for group in groups.values() if name in group), {name: name})
        missing = [other for other in group if _is_missing(installed.get(other))]
        lines += _package_lines(package, group[name], purpose or "more speed", missing)
    lines += _development_lines(groups.get(DEVELOPMENT, {}))
    lines += ["", f"pw generate: {_verdict(machine, groups[BASE])}"]
    return "\n".join(lines)


def _measured(gpus: Collection[str]) -> Iterator[str]:
    """Yield which attention runs on these GPUs, as measured by `pw tune` or an earlier run."""
    for path in sorted((cache_root() / MEASURED).glob("attention-*.json")):
        try:
            found = read_json(path)
            gpu, tokens, choice = found["made_of"]["gpu"], int(found["tokens"]), found["choice"]
        except (UnreadableInput, LookupError, TypeError, ValueError):
            continue  # why silent: the next run measures again, and says so
        if gpu in gpus:
            yield f"{printable(str(choice))} at {tokens:,} tokens on {gpu}, as measured"


def _without_dev(extras: list[str]) -> list[str]:
    return [extra for extra in extras if extra != f"[{DEVELOPMENT}]"]


def is_usable(package: Package | None) -> bool:
    """Return whether a package is installed and can be imported."""
    return package is not None and package.version is not None and package.broken is None


def _unusable(name: str) -> str:
    return f"unknown: the package {name} is missing or cannot be imported"


def _is_missing(package: Package | None) -> bool:
    return package is None or package.version is None


def _package_lines(
    package: Package, requirement: str, purpose: str, missing: list[str]
) -> Iterator[str]:
    """Describe a package; the command that mends it also installs what its group lacks besides."""
    state = "broken" if package.broken else "ok" if package.version else "missing"
    yield f"{state:<8} {package.name:<15} {package.version or '-':<16} {purpose}"
    if package.version and is_outside(package.version, requirement):
        yield f"{'':9}warning   {package.version} is outside the supported range {requirement}"
    if state == "ok":
        return
    if package.broken:
        yield f"{'':9}why       {package.broken}"
    known = KNOWN.get(package.name)
    yield f"{'':9}disables  {known.disables if known else purpose}"
    broken = package.broken is not None
    fix = pip_install(package.name, again=True) if broken else pip_install(*missing)
    yield f"{'':9}fix       {fix}"


def _development_lines(packages: Mapping[str, str]) -> Iterator[str]:
    """Describe the extra for the project's own checks in a line: users do without it."""
    missing = [name for name in packages if not _is_installed(name)]
    if not packages or (sys.platform != "linux" and missing == ["triton"]):
        return
    state = f"{len(missing)} of {len(packages)} missing" if missing else "ok"
    yield f"{'-' if missing else 'ok':<8} {'[dev]':<15} {state:<16} the project's own tests"
    if missing:
        yield f"{'':9}fix       {pip_install(*missing)}"


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _verdict(machine: Machine, base: Mapping[str, str]) -> str:
    if wrong := wrong_packages(machine, base):
        return f"not ready: {', '.join(wrong)}"
    return f"ready on cuda ({machine.gpus[0].name})" if machine.gpus else "ready on cpu"


def wrong_packages(machine: Machine, base: Mapping[str, str]) -> list[str]:
    """List the packages without which nothing runs, and what is wrong with each."""
    installed = {package.name: package for package in machine.packages}
    wrong = []
    for name in base:
        package = installed.get(name)
        if package is None or package.version is None:
            wrong.append(f"{name} is missing")
        elif package.broken:
            wrong.append(f"{name} is broken")
    return wrong


def compiler_text() -> str:
    """Describe the C++ compiler, or what is missing without it."""
    name = cpp_compiler()
    path = shutil.which(name)
    if path is None:
        return f"none ({name} is not there): pw build needs one for a CPU; install {name}"
    try:
        run = subprocess.run(
            [path, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, which does not run ({error}): pw build needs it for a CPU"
    if run.returncode != 0 or not run.stdout:
        return f"{path}, which does not run (exit code {run.returncode}): reinstall it"
    return f"{run.stdout.splitlines()[0]}, {path}"


def conv_text() -> str:
    """Say which convolution the decoder uses on this CPU."""
    try:
        from pw_runtime.system.cpu_kernels import status
    except Exception:  # missing or broken, which the package list says
        return _unusable("torch")
    return status()


def encoders_text() -> str:
    """List the codecs that can be written, and those that cannot."""
    try:
        import av

        from pw_runtime.stages.codecs import RECIPES
    except Exception:  # missing or broken, which the package list says
        return _unusable("av")
    found, lacking = [], []
    for codec, recipe in RECIPES.items():
        try:
            if recipe.encoder is not None:
                av.Codec(recipe.encoder, "w")
            found.append(codec)
        except av.codec.codec.UnknownCodecError:
            lacking.append(f"{codec} ({recipe.encoder})")
    text = ", ".join(found) or "none"
    return f"{text}; av lacks {', '.join(lacking)}" if lacking else text


def _cache() -> str:
    root = cache_root()
    try:
        check_cache()
    except BadRequest as error:
        return f"{root} cannot be used: {error.got}; set PW_CACHE to another folder"
    return f"{root}, {_free(root)}"


def _temporary() -> str:
    try:
        folder = temporary_folder()
    except BadRequest as error:
        return f"{error.got}: set TMPDIR to a folder with room"
    return f"{folder}, {_free(folder)}"


def _free(path: Path) -> str:
    free = free_bytes(path)
    size = _gib(free) if free >= 2**30 else f"{free / 2**20:.1f} MiB"
    return f"{size} free"


def is_outside(version: str, requirement: str) -> bool:
    """Return whether a version breaks a bound of a requirement such as "torch<2.14,>=2.11".

    Compares release numbers; of the operators only >= and <, which are all that we declare.
    """
    release = _release(version)
    lowest = [_release(bound) for bound in re.findall(r">=([\d.]+)", requirement)]
    excluded = [_release(bound) for bound in re.findall(r"<([\d.]+)", requirement)]
    return any(release < bound for bound in lowest) or any(release >= bound for bound in excluded)


def _release(version: str) -> tuple[int, ...]:
    """Return the release numbers of "2.14.0a0+git1234" without the zeros at the end: (2, 14)."""
    numbers = [int(number) for number in re.split(r"[^\d.]", version)[0].split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
