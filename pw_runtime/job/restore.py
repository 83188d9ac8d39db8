# SPDX-License-Identifier: Apache-2.0
"""Results of an earlier run that a clip goes on with: its own, or the draft of another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest, OtherDraft
from pw_runtime.job.clip import TILES, Clip
from pw_runtime.job.identity import differences, of_draft
from pw_runtime.job.latents import SUFFIX, read_latent, read_provenance, read_sound
from pw_runtime.job.provenance import Provenance
from pw_runtime.presets import check_preset
from pw_runtime.sampling.noise import latent_shape, tensor_digest
from pw_runtime.system.input_files import UnreadableInput
from pw_runtime.system.tile_store import read_state
from pw_runtime.types import Latent, Notice, StageName, TextContext, TilingConfig

_TILING = TypeAdapter(TilingConfig)


def restore(clip: Clip, path: Path, stored: Provenance, say: Callable[[str], None]) -> None:
    """Take what an earlier run of the same clip has computed, as far as it is sound.

    Args:
        clip: with nothing computed.
        path: of the latents file, whose provenance is that of the clip.
        stored: this provenance.
        say: tells the user where the clip goes on, and what is damaged.
    """
    tensors, damaged = read_sound(path)
    if damaged:
        say(f"{path} is damaged: {', '.join(damaged)} cannot be used")
    clip.text = _text(clip, tensors)
    done = [stage for stage in clip.request.stages if _has_stage(clip, stage, tensors)]
    if not damaged and clip.last_stage in done:
        clip.latents = clip.kept = path
        clip.provenance = replace(clip.provenance, noise=stored.noise)
    elif "draft" in done and clip.text is not None and clip.last_stage != "draft":
        clip.draft = Latent(x=tensors["draft_latent"].clone())
        if "draft" in clip.request.computed_for(clip.prompt):
            clip.noise["draft"] = tensors["draft_noise"].clone()
        clip.kept = None if damaged else path
    have = ("text", *(("draft",) if clip.draft else ()), *(done if clip.latents else ()))
    if clip.text is None and clip.latents is None:
        return
    clip.earlier = stored
    _take_records(clip, stored, have)
    engines = {network: e for network, e in stored.engines.items() if network != "vae"}
    clip.provenance = replace(clip.provenance, engines={**clip.provenance.engines, **engines})
    say(f"prompt {clip.prompt.id}: going on at the {clip.needs} stage, with what {path} has")


def take_draft(clip: Clip, folder: Path, bundle: Bundle) -> None:
    """Take the text contexts and the draft latent that another run left in a folder.

    Raises OtherDraft where they are not there, damaged, or of another draft.
    """
    path = folder / f"{clip.prompt.id}{SUFFIX}"
    try:
        stored, (tensors, damaged) = read_provenance(path), read_sound(path)
    except BadRequest as error:
        raise OtherDraft(
            error.what,
            got=error.got,
            wanted=f"a complete file <id>{SUFFIX} that `pw generate` left",
            do="check the path; if the file was copied, copy it again; or make the draft again "
            "with --draft-only --save-latents",
        ) from error
    if differing := differences(of_draft(stored, bundle), of_draft(clip.provenance, bundle)):
        raise OtherDraft(
            f"{path} is the draft of another clip than prompt {clip.prompt.id}",
            got="; ".join(differing),
            do="give the preset, the options and the pictures or videos that it was made with, or "
            "make the draft again",
        )
    given, noise = clip.request.noise, clip.noise.get("draft")
    same_noise = stored.noise_file is None
    if noise is not None:
        same_noise = stored.noise.get("draft") == tensor_digest(noise)
    if not same_noise:
        raise OtherDraft(
            f"{path} is a draft of other noise than this run has",
            got=f"noise {'of its seed' if stored.noise_file is None else stored.noise_file}",
            wanted=f"noise {'of its seed' if given is None else f'that {given} has'}",
            do="give --noise as for the draft, or leave --drafts out",
        )
    text = _text(clip, tensors)
    if damaged or text is None or not _has_stage(clip, "draft", tensors):
        raise OtherDraft(
            f"{path} cannot be finished as prompt {clip.prompt.id}",
            got=f"damaged: {', '.join(damaged)}" if damaged else f"only {', '.join(tensors)}",
            wanted="the contexts of every pass, and the draft latent with its noise",
            do="make the draft again with --draft-only --save-latents",
        )
    clip.text, clip.draft = text, Latent(x=tensors["draft_latent"].clone())
    clip.noise["draft"] = tensors["draft_noise"].clone()
    engines = {**clip.provenance.engines}
    if "draft" in stored.engines:
        engines["draft"] = stored.engines["draft"]
    clip.provenance = replace(clip.provenance, engines=engines)
    _take_notices(clip, stored)
    made_with = ", ".join(f"{name} {version}" for name, version in stored.versions.items())
    clip.notices.append(
        Notice(kind="draft", text=f"the draft is that of {path.name}, made with {made_with}")
    )


def _text(clip: Clip, tensors: dict[str, Tensor]) -> TextContext | None:
    """Return the text contexts; None where one is missing that the clip needs."""
    names = {"cond": "text_context", "uncond": "negative_context"}
    found = {name: tensors.get(names[name]) for name in clip.request.passes}
    if any(x is None for x in found.values()):
        return None
    copies = {name: x.clone() for name, x in found.items() if x is not None}
    return TextContext(cond=copies.get("cond"), uncond=copies.get("uncond"))


def _has_stage(clip: Clip, stage: StageName, tensors: dict[str, Tensor]) -> bool:
    """Tell whether a stage's latent and its noise are there, finite and of the right shape.

    A draft that is a video had no noise.
    """
    shape = latent_shape(clip.request.stages[stage], clip.request.preset.video)
    drawn = stage in clip.request.computed_for(clip.prompt)
    found = [tensors.get(f"{stage}_{what}") for what in ("latent", *(["noise"] * drawn))]
    return all(x is not None and tuple(x.shape) == shape and x.isfinite().all() for x in found)


def _take_records(clip: Clip, stored: Provenance, stages: tuple[str, ...]) -> None:
    """Take the notices and the seconds of stages that are not computed again."""
    _take_notices(clip, stored)
    kept = {*stages, "condition", "latents"}
    clip.stopwatch.seconds.update({n: s for n, s in stored.seconds.items() if n in kept})


def _take_notices(clip: Clip, stored: Provenance) -> None:
    """Take the notices of an earlier run."""
    known, fallbacks = {notice.text for notice in clip.notices}, set(stored.fallbacks)
    clip.notices += [
        Notice(kind="fallback" if text in fallbacks else "text", text=text)
        for text in stored.notices
        if text not in known
    ]


def first_tiling(clips: Sequence[Clip]) -> TilingConfig:
    """Return the tiling to plan with: that of the first clip whose decode may have begun."""
    for clip in clips:
        if clip.earlier is not None and clip.latents is not None:
            return earlier_tiling(clip.latents, clip.earlier, clip.path(TILES))
    return clips[0].request.preset.decode


def earlier_tiling(file: Path, provenance: Provenance, tiles: Path) -> TilingConfig:
    """Return the tiling of the run that made latents: as planned, or of its finished tiles.

    They differ where that run ran out of memory and went on with more tiles.

    Args:
        file: with the latents.
        provenance: in it.
        tiles: file of finished tiles, which may be missing.
    """
    # Tile by tile, some may be finished; otherwise the memory that is free now decides again.
    in_turn = provenance.decode.order == "tiles"
    order = "tiles" if in_turn else provenance.preset.decode.order
    planned = replace(provenance.decode, order=order)
    try:
        made_of = read_state(tiles)
        tiling = _TILING.validate_json(made_of["tiling"])
        check_preset(replace(provenance.preset, decode=tiling), str(file))
    except (UnreadableInput, ValidationError, KeyError, BadRequest):
        return planned  # why silent: none are there, or the decode tells that it cannot take them
    stage = list(provenance.stages)[-1]
    latent = read_latent(file, provenance, stage, torch.device("cpu"))
    same_kind = (tiling.tiling, tiling.order) == (provenance.decode.tiling, "tiles")
    return tiling if same_kind and made_of.get("latent") == tensor_digest(latent.x) else planned
