# SPDX-License-Identifier: Apache-2.0
"""PixelWizard Runtime: prompts in, 2K and 4K clips out.

The names below are the Python interface (docs/python.md); each is imported when it is first used.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle, open_bundle
    from pw_runtime.checkpoint.lora import with_loras
    from pw_runtime.errors import Cancelled, PixelWizardError
    from pw_runtime.interface.call import PipelineOutput
    from pw_runtime.interface.pipe import Pipeline
    from pw_runtime.pipeline import generate
    from pw_runtime.presets import PRESETS, find_preset
    from pw_runtime.prompts import make_prompts, read_prompts
    from pw_runtime.sizes import sized
    from pw_runtime.system.progress import Progress, Reporter
    from pw_runtime.system.stop import StopRequest
    from pw_runtime.types import LoraFile, Outcome, Preset, Prompt, Request, RunOptions

    __version__: str

_HOME = {
    "Pipeline": "pw_runtime.interface.pipe",
    "PipelineOutput": "pw_runtime.interface.call",
    "generate": "pw_runtime.pipeline",
    "open_bundle": "pw_runtime.checkpoint.bundle",
    "Bundle": "pw_runtime.checkpoint.bundle",
    "with_loras": "pw_runtime.checkpoint.lora",
    "PRESETS": "pw_runtime.presets",
    "find_preset": "pw_runtime.presets",
    "make_prompts": "pw_runtime.prompts",
    "read_prompts": "pw_runtime.prompts",
    "sized": "pw_runtime.sizes",
    "Progress": "pw_runtime.system.progress",
    "Reporter": "pw_runtime.system.progress",
    "StopRequest": "pw_runtime.system.stop",
    "Request": "pw_runtime.types",
    "RunOptions": "pw_runtime.types",
    "LoraFile": "pw_runtime.types",
    "Prompt": "pw_runtime.types",
    "Preset": "pw_runtime.types",
    "Outcome": "pw_runtime.types",
    "Cancelled": "pw_runtime.errors",
    "PixelWizardError": "pw_runtime.errors",
}

__all__ = [
    "PRESETS",
    "Bundle",
    "Cancelled",
    "LoraFile",
    "Outcome",
    "Pipeline",
    "PipelineOutput",
    "PixelWizardError",
    "Preset",
    "Progress",
    "Prompt",
    "Reporter",
    "Request",
    "RunOptions",
    "StopRequest",
    "__version__",
    "find_preset",
    "generate",
    "make_prompts",
    "open_bundle",
    "read_prompts",
    "sized",
    "with_loras",
]


if not TYPE_CHECKING:  # a type checker would take any name for an object

    def __getattr__(name):
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        if name == "__version__":
            try:
                return metadata.version("pixelwizard-runtime")
            except metadata.PackageNotFoundError:
                return "0+source"  # a checkout that is not installed
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
