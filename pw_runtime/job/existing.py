# SPDX-License-Identifier: Apache-2.0
"""Files of earlier runs in the output folder: refused, replaced, or accepted as finished."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pw_runtime.errors import BadRequest
from pw_runtime.job.clip import Clip
from pw_runtime.job.latents import SUFFIX, is_resumable
from pw_runtime.job.receipt import read_receipt
from pw_runtime.sampling.noise import tensor_digest
from pw_runtime.system.atomic_files import require_replaceable
from pw_runtime.types import Request

SHEET = "contact_sheet.png"
VIDEOS = (".mp4", ".mkv")
# Options that change the frames or the file; the others may differ between equal clips.
_DECIDING = (
    "codec",
    "precision",
    "vae_precision",
    "kernels",
    "attention",
    "conv",
    "chunk",
    "draft_only",
    "linear",
    "step_cache",
    "sparse_attention",
    "guidance_reuse",
)
# Options that came later, as they were before.
_SINCE = {"linear": "exact", "step_cache": None, "sparse_attention": None, "guidance_reuse": 0}
_SHOWN = 8  # files named in an error


def settle_existing(clips: Iterable[Clip], request: Request) -> None:
    """Apply `request.existing` to files of earlier runs, before anything is computed.

    With "skip", a clip whose receipt describes the same clip gets its video, and is not computed.

    Raises:
        BadRequest: a file would be replaced that may not be, or belongs to another clip.
    """
    standing: list[Path] = []
    for clip in clips:
        files = _files_of(clip)
        for path in files:
            require_replaceable(path)
        if request.existing == "overwrite":
            require_one_container(clip)
            continue
        if request.existing == "skip" and _is_finished(clip):
            clip.video = clip.target
        else:
            standing += files
    sheet = request.out / SHEET
    if request.contact_sheet and os.path.lexists(sheet):
        require_replaceable(sheet)
        standing += [sheet] if request.existing != "overwrite" else []
    if standing:
        raise _refused(standing, request)


def _files_of(clip: Clip) -> list[Path]:
    """List the existing files that the clip would replace, links to nothing included."""
    endings = (*VIDEOS, ".json", SUFFIX, ".partial.mp4")
    return [path for ending in endings if os.path.lexists(path := clip.path(ending))]


def require_one_container(clip: Clip) -> None:
    """Raise BadRequest where a video in another container would stay, and lose its receipt."""
    for ending in VIDEOS:
        other = clip.path(ending)
        if other != clip.target and os.path.lexists(other):
            raise BadRequest(
                f"{other} would stay beside {clip.target.name}, described by no receipt",
                got=f"a clip of another codec than {clip.request.options.codec}",
                do=f"remove {other.name}, or choose another --out",
            )


def _is_finished(clip: Clip) -> bool:
    """Tell whether the clip's video and receipt are complete.

    Raises BadRequest where they describe another clip.
    """
    path = clip.path(".json")
    if not (path.exists() and clip.target.exists()):
        return False
    try:
        receipt = read_receipt(path)
        stored = _identity_of_receipt(receipt)
        video_bytes = receipt["video"]["bytes"]
    except KeyError as error:
        raise BadRequest(
            f"{path} is not a receipt that can be compared",
            got=f"no {error}",
            do="pass --overwrite to replace the clip, or choose another --out",
        ) from error
    expected = _identity(clip)
    differing = [name for name in expected if stored.get(name) != expected[name]]
    if differing:
        raise BadRequest(
            f"{clip.target} is another clip",
            got=f"a receipt with another {', '.join(differing)}",
            do="pass --overwrite to replace it, or choose another --out",
        )
    return bool(clip.target.stat().st_size == video_bytes)


def _identity(clip: Clip) -> dict[str, Any]:
    """Return what decides the clip's video, as a receipt stores it."""
    provenance = clip.provenance
    options = asdict(provenance.options)
    identity = {
        "prompt": asdict(provenance.prompt),
        "negative": provenance.negative,
        "seeds": provenance.seeds,
        "preset": asdict(provenance.preset),
        "options": {name: options[name] for name in _DECIDING},
        "bundle": provenance.bundle["digest"],
        "noise file": {stage: tensor_digest(x) for stage, x in clip.noise.items()},
    }
    return dict(json.loads(json.dumps(identity)))


def _identity_of_receipt(receipt: dict[str, Any]) -> dict[str, Any]:
    """Return the same fields of a receipt."""
    return {
        "prompt": receipt["prompt"],
        "negative": receipt["negative"],
        "seeds": receipt["seeds"],
        "preset": receipt["preset"],
        "options": {name: (_SINCE | receipt["options"])[name] for name in _DECIDING},
        "bundle": receipt["bundle"]["digest"],
        "noise file": receipt["noise"] if receipt["noise_file"] else {},
    }


def _refused(standing: list[Path], request: Request) -> BadRequest:
    names = ", ".join(path.name for path in standing[:_SHOWN])
    more = f" and {len(standing) - _SHOWN} more" if len(standing) > _SHOWN else ""
    resumable = [path for path in standing if path.name.endswith(SUFFIX) and is_resumable(path)]
    ways = ["--overwrite replaces them"]
    if request.existing == "refuse":
        ways.append("--skip-existing keeps clips that are finished")
    if resumable:
        files = shlex.join(map(str, resumable[:_SHOWN]))
        ways.append(f"`pw decode {files} --model BUNDLE` finishes what has latents")
    return BadRequest(
        f"{request.out} contains files of an earlier run",
        got=names + more,
        do="; ".join([*ways, "or choose another --out"]),
    )
