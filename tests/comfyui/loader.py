# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's contract with nodes, as far as ours need it: loading a file of `custom_nodes`, checking
inputs against INPUT_TYPES, calling FUNCTION, its progress bar and its interruption.

ComfyUI itself is no package; these nodes were run by hand in ComfyUI 0.17.0 too (docs/comfyui.md).
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NUMBERS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class InterruptProcessingException(Exception):
    pass


class Comfy:
    """A stand-in for the packages `comfy.utils` and `comfy.model_management`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bars: list[list[int]] = []
        self.interrupt_at: int | None = None
        self.memory_calls: list[str] = []
        utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
        utils.ProgressBar = self._bar  # type: ignore[attr-defined]
        management.throw_exception_if_processing_interrupted = self._check  # type: ignore[attr-defined]
        for name in ("unload_all_models", "soft_empty_cache"):
            setattr(management, name, partial(self.memory_calls.append, name))
        for module in (ModuleType("comfy"), utils, management):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def _bar(self, total: int) -> Any:
        values: list[int] = []
        self.bars.append(values)

        class Bar:
            def update_absolute(self, value: int) -> None:
                assert 0 <= value <= total
                values.append(value)

        return Bar()

    def _check(self) -> None:
        if self.interrupt_at is not None and self.bars[-1][-1] >= self.interrupt_at:
            raise InterruptProcessingException


def load_custom_node(file: Path) -> dict[str, type]:
    """Load a file as the loader does, under a name of its own; return its nodes."""
    spec = importlib.util.spec_from_file_location(str(file.with_suffix("")), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, node in module.NODE_CLASS_MAPPINGS.items():
        assert isinstance(name, str)
        node.RELATIVE_PYTHON_MODULE = f"custom_nodes.{file.stem}"  # the loader sets it
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    return dict(module.NODE_CLASS_MAPPINGS)


def call(node: type, **given: Any) -> tuple[Any, ...]:
    """Check inputs against INPUT_TYPES, and call the node as the executor does."""
    inputs = node.INPUT_TYPES()  # type: ignore[attr-defined]
    assert inputs["required"].keys() <= given.keys()
    known = inputs["required"] | inputs.get("optional", {})
    for name, value in given.items():
        kind = known[name][0]
        if isinstance(kind, list):
            assert value in kind
        elif kind in NUMBERS:
            assert isinstance(value, NUMBERS[kind])
            options = known[name][1]
            assert options.get("min", value) <= value <= options.get("max", value)
    function = getattr(node(), node.FUNCTION)  # type: ignore[attr-defined]
    results = function(**given)
    assert isinstance(results, tuple)
    assert len(results) == len(node.RETURN_TYPES)  # type: ignore[attr-defined]
    return results
