# SPDX-License-Identifier: Apache-2.0
"""PixelWizard Runtime: prompts in, 2K and 4K clips out.

The names below are the Python interface; each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle, open_bundle
    from pw_runtime.errors import PixelWizardError
    from pw_runtime.pipeline import generate
    from pw_runtime.presets import PRESETS, find_preset
    from pw_runtime.prompts import make_prompts, read_prompts
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Outcome, Preset, Prompt, Request, RunOptions

_HOME = {
    "generate": "pw_runtime.pipeline",
    "open_bundle": "pw_runtime.checkpoint.bundle",
    "Bundle": "pw_runtime.checkpoint.bundle",
    "PRESETS": "pw_runtime.presets",
    "find_preset": "pw_runtime.presets",
    "make_prompts": "pw_runtime.prompts",
    "read_prompts": "pw_runtime.prompts",
    "Reporter": "pw_runtime.system.progress",
    "Request": "pw_runtime.types",
    "RunOptions": "pw_runtime.types",
    "Prompt": "pw_runtime.types",
    "Preset": "pw_runtime.types",
    "Outcome": "pw_runtime.types",
    "PixelWizardError": "pw_runtime.errors",
}

__all__ = [
    "PRESETS",
    "Bundle",
    "Outcome",
    "PixelWizardError",
    "Preset",
    "Prompt",
    "Reporter",
    "Request",
    "RunOptions",
    "find_preset",
    "generate",
    "make_prompts",
    "open_bundle",
    "read_prompts",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
