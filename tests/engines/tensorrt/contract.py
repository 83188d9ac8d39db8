# SPDX-License-Identifier: Apache-2.0
"""Calls are held to the signatures of the real bindings (manifest.json)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any


def bound_to_manifest(cls: type, entries: dict[str, Any], seen: set[str]) -> dict[str, Any]:
    """Members for a subclass of `cls` that checks every call; adds what is used to `seen`.

    Raises AssertionError where `cls` has a public member that the bindings do not have, or
    settable where theirs is not.
    """
    members = {}
    known = [vars(base) for base in reversed(cls.__mro__) if base.__module__ != "builtins"]
    for name, member in {k: v for one in known for k, v in one.items()}.items():
        if name.startswith("_") and name != "__init__":
            continue
        full = f"{cls.__name__}.{name}"
        what = entries.get(full)
        if isinstance(member, property):
            expected = "read-write" if member.fset else "read-only"
            assert what in (expected, "read-write"), f"{full} is {what} in the bindings"
            members[name] = _recorded(member, full, seen)
        elif callable(member) and full in entries:
            members[name] = _checked(member, full, what, seen)
        else:
            # What TensorRT makes and not the user has no __init__ of ours to compare.
            assert name == "__init__", f"the bindings have no {full}"
    return members


def _recorded(member: property, full: str, seen: set[str]) -> property:
    def get(self: Any) -> Any:
        seen.add(full)
        assert member.fget is not None
        return member.fget(self)

    def put(self: Any, value: Any) -> None:
        seen.add(full)
        assert member.fset is not None
        member.fset(self, value)

    return property(get, put if member.fset else None)


def _checked(
    function: Callable[..., Any], full: str, signatures: list[str], seen: set[str]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.add(full)
        reasons = [_mismatch(signature, arguments, named) for signature in signatures]
        if all(reasons):
            raise TypeError(f"{full}: {'; '.join(map(str, reasons))}; expected {signatures}")
        return function(self, *arguments, **named)

    return call


def _mismatch(signature: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """Why the arguments do not fit; None if they do."""
    expected = parameters(signature)
    if len(arguments) > len(expected):
        return f"{len(arguments)} arguments"
    given = dict(zip(expected, arguments, strict=False))
    if unexpected := (given.keys() & named.keys()) | (named.keys() - expected.keys()):
        return f"argument {', '.join(sorted(unexpected))}"
    given |= named
    for name, (annotation, required) in expected.items():
        if name not in given:
            if required:
                return f"no {name}"
        elif not accepts(annotation, given[name]):
            return f"{name} is {type(given[name]).__name__}"
    return None


def parameters(signature: str) -> dict[str, tuple[str, bool]]:
    """Name -> (type, whether it must be given) of "f(self: A, b: int = 0) -> C"."""
    inner = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    parameters_of = {}
    for part in re.split(r", (?=\w+: )", inner):
        name, _, rest = part.partition(": ")
        annotation, default, _ = rest.partition(" = ")
        parameters_of[name] = (annotation, not default)
    parameters_of.pop("self")
    return parameters_of


def accepts(annotation: str, value: Any) -> bool:
    """Return True if pybind11 would convert a value to a type of the bindings."""
    annotation = annotation.rpartition(".")[2]
    if annotation in ("int", "SupportsInt"):
        return isinstance(value, int)
    if annotation in ("buffer", "Buffer"):
        return isinstance(value, bytes | memoryview)
    if annotation in ("bool", "str", "tuple", "list"):
        return type(value).__name__ == annotation
    if annotation == "Dims" and isinstance(value, tuple | list):
        return True
    return any(base.__name__ == annotation for base in type(value).__mro__)
