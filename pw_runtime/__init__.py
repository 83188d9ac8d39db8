# SPDX-License-Identifier: Apache-2.0
"""PixelWizard Runtime: prompts in, 2K and 4K clips out.

The names below are the Python interface; they are imported when first used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "generate": "pw_runtime.pipeline",
    "open_bundle": "pw_runtime.checkpoint.bundle",
    "Bundle": "pw_runtime.checkpoint.bundle",
    "PRESETS": "pw_runtime.presets",
    "find_preset": "pw_runtime.presets",
    "read_prompts": "pw_runtime.prompts",
    "Reporter": "pw_runtime.system.progress",
    "Request": "pw_runtime.types",
    "Prompt": "pw_runtime.types",
    "Preset": "pw_runtime.types",
    "Outcome": "pw_runtime.types",
    "PixelWizardError": "pw_runtime.errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
