# SPDX-License-Identifier: Apache-2.0
"""The report of `pw doctor` as data: docs/json.md describes the keys.

Imports the standard library alone, as the report does.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pw_runtime.cli.doctor import (
    NATIVE_BF16,
    compiler_text,
    conv_text,
    encoders_text,
    is_outside,
    is_usable,
    wrong_packages,
)
from pw_runtime.errors import BadRequest
from pw_runtime.system.machine import Machine, cpu_features
from pw_runtime.system.packages import BASE, KNOWN, Package, declared, pip_install
from pw_runtime.system.places import cache_root, check_cache, free_bytes, temporary_folder


def doctor_document(machine: Machine) -> dict[str, Any]:
    """Return what is installed, missing or broken; `ready` names the device that runs."""
    groups = declared()
    installed = {package.name: package for package in machine.packages}
    wrong = wrong_packages(machine, groups[BASE])
    names = [*installed, *(name for name in groups[BASE] if name not in installed)]
    return {
        "ready": None if wrong else "cuda" if machine.gpus else "cpu",
        "problems": wrong,
        "python": machine.python,
        "system": machine.os,
        "cpu": {
            "name": machine.cpu,
            "cores": machine.cores,
            "bf16": sorted(cpu_features() & NATIVE_BF16),
        },
        "memory_bytes": machine.memory_bytes,
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "driver": machine.driver,
        "compiler": compiler_text(),
        "conv": conv_text() if is_usable(installed.get("torch")) else None,
        "encoders": encoders_text() if is_usable(installed.get("av")) else None,
        "cache": _cache(),
        "temporary": _temporary(),
        "packages": [
            _package(installed.get(name, Package(name=name, version=None)), groups)
            for name in names
        ],
    }


def _package(package: Package, groups: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Describe a package: its state, who needs it, and the command that mends it."""
    named = [group for group, names in groups.items() if package.name in names]
    requirement = groups[named[0]][package.name] if named else package.name
    state = "broken" if package.broken else "ok" if package.version else "missing"
    known = KNOWN.get(package.name)
    fix = pip_install(package.name, again=state == "broken")
    return {
        "name": package.name,
        "version": package.version,
        "state": state,
        "why": package.broken,
        "requirement": requirement,
        "outside": bool(package.version) and is_outside(package.version or "", requirement),
        "needed_for": ["everything" if group == BASE else f"[{group}]" for group in named],
        "disables": known.disables if known and state != "ok" else None,
        "fix": None if state == "ok" else fix,
    }


def _cache() -> dict[str, Any]:
    root = cache_root()
    try:
        check_cache()
    except BadRequest as error:
        return {"folder": str(root), "problem": str(error.got), "free_bytes": None}
    return {"folder": str(root), "problem": None, "free_bytes": free_bytes(root)}


def _temporary() -> dict[str, Any]:
    try:
        folder = temporary_folder()
    except BadRequest as error:
        return {"folder": None, "problem": str(error.got), "free_bytes": None}
    return {"folder": str(folder), "problem": None, "free_bytes": free_bytes(folder)}
