# SPDX-License-Identifier: Apache-2.0
"""The nodes: classes as ComfyUI's loader and executor want them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pw_runtime.errors import BadRequest
from pw_runtime.types import OFFICIAL_NEGATIVE

if TYPE_CHECKING:
    import torch

    from pw_runtime.interface.pipe import Pipeline
    from pw_runtime.system.progress import Progress

Inputs = dict[str, dict[str, tuple[Any, ...]]]
CATEGORY: Final = "PixelWizard"
PIPELINE: Final = "PIXELWIZARD"  # type of a link that carries a loaded model
PRESET_NAMES: Final = (
    *("2k", "2k-portrait", "2k-square", "4k", "4k-portrait", "4k-square", "4k-5step"),
    *("draft", "nano", "nano-portrait", "nano-square", "nano-hd"),
)
STEPS: Final = 1000  # of the progress bar
MAX_SEED: Final = 2**53 - 1  # the largest whole number that a browser keeps

_TEXT: Final = ("STRING", {"multiline": True, "default": ""})
_NEGATIVE: Final = ("STRING", {"multiline": True, "default": OFFICIAL_NEGATIVE})
# "fixed": a seed that changes after every run would make another draft than the chosen one.
_SEED: Final = (
    "INT",
    {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": "fixed"},
)
_MADE_OF: Final = MappingProxyType({"prompt": _TEXT, "negative": _NEGATIVE, "seed": _SEED})


class Load:
    """Opens a model; its networks stay loaded from run to run as far as memory allows."""

    CATEGORY: ClassVar = CATEGORY
    DESCRIPTION: ClassVar = (
        "A bundle made by `pw convert`, or the folder of a published checkpoint with the "
        "PixelWizard files beside it, which is converted on first use."
    )
    RETURN_TYPES: ClassVar = (PIPELINE,)
    RETURN_NAMES: ClassVar = ("model",)
    FUNCTION: ClassVar = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Return the inputs: model and preset; what may be left empty."""
        return {
            "required": {
                "model": ("STRING", {"default": ""}),
                "preset": (list(PRESET_NAMES), {"default": "2k"}),
            },
            "optional": {
                "preset_file": ("STRING", {"default": "", "tooltip": "a .toml file instead"}),
                "changes": (
                    "STRING",
                    {"multiline": True, "default": "", "tooltip": "highres.steps=5, one a line"},
                ),
                "draft_checkpoint": ("STRING", {"default": ""}),
                "highres_checkpoint": ("STRING", {"default": ""}),
                "device": (["auto", "cpu", "cuda"], {"default": "auto"}),
            },
        }

    @classmethod
    def IS_CHANGED(  # noqa: N802
        cls, model: str | None = None, preset_file: str | None = None, **_: object
    ) -> str:
        """Return another value when a named file has changed: ComfyUI then opens them again.

        Names that come from other nodes are not known yet: they are None, or not given.
        """
        from pw_runtime.checkpoint.manifest import MANIFEST

        digest = hashlib.sha256()
        for name, inside in ((model, MANIFEST), (preset_file, "")):
            with suppress(OSError):  # why silent: `load` says what it cannot read
                digest.update(b"" if name is None else Path(name.strip(), inside).read_bytes())
        return digest.hexdigest()

    def load(
        self,
        model: str,
        preset: str,
        preset_file: str = "",
        changes: str = "",
        draft_checkpoint: str = "",
        highres_checkpoint: str = "",
        device: str = "auto",
    ) -> tuple[Pipeline]:
        """Open the model; nothing is loaded before a node needs it."""
        from pw_runtime.interface.pipe import Pipeline

        if not model.strip():
            raise BadRequest(
                "no model is named", do="give the folder of a bundle, or of a checkpoint"
            )
        pipe = Pipeline.from_pretrained(
            model.strip(),
            preset=preset_file.strip() or preset,
            changes=tuple(line.strip() for line in changes.splitlines() if line.strip()),
            draft=draft_checkpoint.strip() or None,
            highres=highres_checkpoint.strip() or None,
            device=device,
        )
        return (pipe,)


class Draft:
    """Makes the draft of a clip: structure and motion, at low resolution."""

    CATEGORY: ClassVar = CATEGORY
    DESCRIPTION: ClassVar = (
        "The draft of a clip; decode it to see it, finish it at high resolution."
    )
    RETURN_TYPES: ClassVar = ("LATENT",)
    FUNCTION: ClassVar = "draft"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Return the inputs: a model, what makes the clip, and the picture that it starts from."""
        return {
            "required": {"model": (PIPELINE,), **_MADE_OF},
            "optional": {"image": ("IMAGE", {"tooltip": "the first frame"})},
        }

    def draft(
        self,
        model: Pipeline,
        prompt: str,
        negative: str,
        seed: int,
        image: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor]]:
        """Make the draft, from an image, [1, H, W, 3] in 0 to 1, where there is one."""
        from pw_runtime.comfyui.latent import picture_of, to_comfy
        from pw_runtime.interface.parts import Parts

        start = None if image is None else picture_of(image)
        _make_room(model)
        x = Parts(model, _progress()).draft(prompt, negative, seed, start)
        return (to_comfy(x, model.bundle.networks.vae.config),)


class Finish:
    """Paints the full resolution, steered by a draft."""

    CATEGORY: ClassVar = CATEGORY
    DESCRIPTION: ClassVar = (
        "The high-resolution latent of a draft. With the prompt and the seed of the draft it is "
        "the latent of `pw generate`, bit for bit."
    )
    RETURN_TYPES: ClassVar = ("LATENT",)
    FUNCTION: ClassVar = "finish"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Return the inputs: a model, the draft, and what makes the clip."""
        return {"required": {"model": (PIPELINE,), "draft": ("LATENT",), **_MADE_OF}}

    def finish(
        self, model: Pipeline, draft: dict[str, Any], prompt: str, negative: str, seed: int
    ) -> tuple[dict[str, torch.Tensor]]:
        """Finish the draft."""
        from pw_runtime.comfyui.latent import from_comfy, to_comfy
        from pw_runtime.interface.parts import Parts

        vae = model.bundle.networks.vae.config
        _make_room(model)
        x = Parts(model, _progress()).finish(from_comfy(draft, vae), prompt, negative, seed)
        return (to_comfy(x, vae),)


class Decode:
    """Turns a latent into frames."""

    CATEGORY: ClassVar = CATEGORY
    DESCRIPTION: ClassVar = "Frames of a draft or of a finished clip, without seams in any memory."
    RETURN_TYPES: ClassVar = ("IMAGE",)
    FUNCTION: ClassVar = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Return the inputs: a model and a latent."""
        return {"required": {"model": (PIPELINE,), "latent": ("LATENT",)}}

    def decode(self, model: Pipeline, latent: dict[str, Any]) -> tuple[torch.Tensor]:
        """Decode a latent: [F, H, W, 3] fp32, 0 to 1; each is a byte of the clip / 255."""
        from pw_runtime.comfyui.latent import from_comfy
        from pw_runtime.interface.parts import Parts

        x = from_comfy(latent, model.bundle.networks.vae.config)
        _make_room(model)
        return (Parts(model, _progress()).decode(x).float().div_(255),)


def _make_room(model: Pipeline) -> None:
    """Let ComfyUI take its own models off the GPU: the plan counts what is free."""
    if model.device.type != "cuda":
        return
    try:
        from comfy.model_management import soft_empty_cache, unload_all_models
    except ImportError:  # why silent: outside ComfyUI it has none
        return
    unload_all_models()
    soft_empty_cache()


def _progress() -> Callable[[Progress], None]:
    """Return a callback that moves ComfyUI's progress bar, and ends where the user interrupts."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted as check
        from comfy.utils import ProgressBar
    except ImportError:  # why silent: outside ComfyUI there is no bar to move
        return lambda progress: None
    bar = ProgressBar(STEPS)

    def show(progress: Progress) -> None:
        bar.update_absolute(round(STEPS * progress.fraction))
        check()

    return show


NODE_CLASS_MAPPINGS: Final[Mapping[str, type]] = {
    "PixelWizardLoad": Load,
    "PixelWizardDraft": Draft,
    "PixelWizardFinish": Finish,
    "PixelWizardDecode": Decode,
}
NODE_DISPLAY_NAME_MAPPINGS: Final[Mapping[str, str]] = {
    "PixelWizardLoad": "Load PixelWizard",
    "PixelWizardDraft": "PixelWizard Draft",
    "PixelWizardFinish": "PixelWizard Finish (2K, 4K)",
    "PixelWizardDecode": "PixelWizard Decode",
}
