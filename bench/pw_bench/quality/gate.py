# SPDX-License-Identifier: Apache-2.0
"""The quality of the built-in model in figures: what captions become, and what detail is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pw_bench.quality.measure import Seen, look_at, psnr, sharpness, ssim
from pw_bench.quality.render import Example, Studio, examples
from pw_export.nano.scenes import Scene, render
from pw_runtime.system.machine import Machine
from pw_runtime.types import Latent, Preset, StageConfig

PARTS = ("colour", "shape", "motion")
TRUE, DRAFT = "true renderings", "draft"

Paint = Callable[[Example, Latent], Latent]
"""A draft latent of an example -> a high-res latent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to make the clips of the captions; `adherence` are shares of them, by part."""

    name: str
    adherence: dict[str, float]
    sharpness: float
    seen: tuple[Seen, ...]  # caption by caption


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How near a way comes to the true renderings, clip by clip. PSNR in dB."""

    name: str
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    mean_psnr: float
    mean_ssim: float
    sharpness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Content of the result file."""

    machine: Machine
    commit: str
    preset: str
    plan: Preset
    weights: str  # SHA-256 of the bundle
    captions: tuple[str, ...]
    wanted: tuple[Seen, ...]  # what the captions say
    ways: tuple[Way, ...]
    reconstruction: tuple[Likeness, ...]  # through encoder and decoder, by size
    from_true_drafts: tuple[Likeness, ...]


def ways_to_paint(studio: Studio, preset: Preset) -> dict[str, Paint]:
    """The high-res stage in 4 steps, in other numbers of them, and with parts left out."""
    counts = {"4 steps": 4, "1 step": 1, "2 steps": 2, "8 steps": 8}
    nets = {name: (studio.highres, steps) for name, steps in counts.items()}
    nets |= {"no dt": (studio.no_step, 4), "no adapter": (studio.no_adapter, 4)}

    def way(name: str) -> Paint:
        net, steps = nets[name]
        return lambda example, low: studio.paint(example, low, preset, net, steps)

    return {name: way(name) for name in nets}


def adherence(studio: Studio, preset: Preset, shown: list[Example]) -> tuple[Way, ...]:
    """Make the clips of captions in every way and look at them."""
    plan = highres_of(preset)
    paints = ways_to_paint(studio, preset)
    seen: dict[str, list[Seen]] = {name: [] for name in (TRUE, DRAFT, *paints)}
    edges: dict[str, list[float]] = {name: [] for name in seen}
    for example in shown:
        low = studio.draft_of(example, preset)
        clips = {TRUE: true_video(example.scene, plan, preset), DRAFT: studio.frames(low)}
        clips |= {name: studio.frames(paint(example, low)) for name, paint in paints.items()}
        for name, clip in clips.items():
            seen[name].append(look_at(clip))
            edges[name].append(sharpness(enlarged(clip, plan)))
    scenes = [example.scene for example in shown]
    return tuple(
        Way(
            name=name, adherence=shares(seen[name], scenes), sharpness=mean(edges[name]), seen=found
        )
        for name, found in ((name, tuple(found)) for name, found in seen.items())
    )


def shares(seen: list[Seen], scenes: list[Scene]) -> dict[str, float]:
    """Share of clips whose colour, shape and motion are as the captions say."""
    right = [one.agrees(scene) for one, scene in zip(seen, scenes, strict=True)]
    return {part: mean([float(one[part]) for one in right]) for part in PARTS}


def reconstruction(studio: Studio, preset: Preset, count: int) -> tuple[Likeness, ...]:
    """True renderings through encoder and decoder, at the sizes of both stages."""
    found = []
    for plan in (preset.draft, highres_of(preset)):
        clips = [true_video(example.scene, plan, preset) for example in examples(count)]
        back = [studio.frames(studio.latent_of(clip)) for clip in clips]
        found.append(likeness(f"{plan.width}x{plan.height}", back, clips))
    return tuple(found)


def from_true_drafts(studio: Studio, preset: Preset, count: int) -> tuple[Likeness, ...]:
    """High-res clips of drafts that are true, beside those drafts enlarged."""
    plan, paints = highres_of(preset), ways_to_paint(studio, preset)
    clips: dict[str, list[Tensor]] = {name: [] for name in ("draft enlarged", *paints)}
    true = []
    for example in examples(count):
        low = studio.latent_of(true_video(example.scene, preset.draft, preset))
        true.append(true_video(example.scene, plan, preset))
        clips["draft enlarged"].append(enlarged(studio.frames(low), plan))
        for name, paint in paints.items():
            clips[name].append(studio.frames(paint(example, low)))
    return tuple(likeness(name, made, true) for name, made in clips.items())


def likeness(name: str, made: list[Tensor], true: list[Tensor]) -> Likeness:
    """Compare videos, pair by pair."""
    ratios = [psnr(*pair) for pair in zip(made, true, strict=True)]
    alike = [ssim(*pair) for pair in zip(made, true, strict=True)]
    return Likeness(
        name=name,
        psnr=tuple(round(one, 3) for one in ratios),
        ssim=tuple(round(one, 4) for one in alike),
        mean_psnr=mean(ratios),
        mean_ssim=mean(alike),
        sharpness=mean([sharpness(video) for video in made]),
    )


def highres_of(preset: Preset) -> StageConfig:
    """The high-res stage of a preset that has one."""
    assert preset.highres is not None
    return preset.highres


def true_video(scene: Scene, plan: StageConfig, preset: Preset) -> Tensor:
    """[3, F, height, width] as a caption means it, at the size of a stage."""
    return render(scene, plan.width, plan.height, preset.video.frames)


def enlarged(video: Tensor, plan: StageConfig) -> Tensor:
    """The video at the size of a stage, bilinear."""
    size = (plan.height, plan.width)
    grown = F.interpolate(video.transpose(0, 1), size=size, mode="bilinear", align_corners=False)
    return grown.transpose(0, 1)


def mean(values: list[float]) -> float:
    """To six digits: more are no one's."""
    return round(sum(values) / len(values), 6)
