# SPDX-License-Identifier: Apache-2.0
"""The metadata of a clip's video file: what players show, and what is left without a receipt."""

from __future__ import annotations

import json
from typing import Final

from pw_runtime.job.provenance import Provenance
from pw_runtime.presets import UNNAMED, preset_name

PROJECT: Final = "pixelwizard-runtime"
TITLE: Final = 200  # characters: players cut longer titles, some at 255 bytes
NUL: Final = "\N{SYMBOL FOR NULL}"  # in place of the character that ends a tag


def video_tags(provenance: Provenance) -> dict[str, str]:
    """Return title, description and comment of a clip; equal clips have equal tags.

    The title is the prompt, cut at TITLE characters; the description is the whole prompt; the
    comment is JSON with the prompt, its position, the base seed, the preset, the stage that the
    clip shows and the program. A NUL in the prompt is shown as NUL in the former two.
    """
    prompt = provenance.prompt
    text = prompt.text.replace("\0", NUL)
    version = provenance.versions.get(PROJECT, "of an unknown version")
    comment = {
        "program": f"PixelWizard Runtime {version}",
        "preset": preset_name(provenance.preset, decode=False).replace(UNNAMED, "custom"),
        "stage": list(provenance.stages)[-1],
        "seed": provenance.seeds["base"],
        "position": prompt.position,
        "prompt": prompt.text,
    }
    return {
        "title": text if len(text) <= TITLE else text[: TITLE - 1] + "…",
        "description": text,
        "comment": json.dumps(comment, ensure_ascii=False),
    }
