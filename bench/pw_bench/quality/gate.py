# SPDX-License-Identifier: Apache-2.0
"""The quality of the built-in model in numbers: adherence to captions, and detail."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from pw_bench.quality.measure import ATTRIBUTES, classify, matches, psnr, sharpness, ssim
from pw_bench.quality.render import Example, Renderer, examples
from pw_bench.result_sections import Attributes, Likeness, Variant
from pw_export.nano.scenes import Scene, render
from pw_runtime.types import Latent, Preset, StageConfig

TRUE, DRAFT = "true renderings", "draft"

Highres = Callable[[Example, Latent], Latent]
"""A draft latent of an example -> a high-res latent."""


def highres_variants(renderer: Renderer, preset: Preset) -> dict[str, Highres]:
    """Return the high-res stage in 4 steps, in other numbers of them, and with parts disabled."""
    counts = {"4 steps": 4, "1 step": 1, "2 steps": 2, "8 steps": 8}
    networks = {name: (renderer.highres, steps) for name, steps in counts.items()}
    networks |= {"no dt": (renderer.no_dt, 4), "no adapter": (renderer.no_adapter, 4)}

    def variant(name: str) -> Highres:
        net, steps = networks[name]
        return lambda example, low: renderer.highres_latent(example, low, preset, net, steps)

    return {name: variant(name) for name in networks}


def adherence(renderer: Renderer, preset: Preset, held_out: list[Example]) -> tuple[Variant, ...]:
    """Make the clips of captions in every variant and classify them."""
    config = highres_of(preset)
    variants = highres_variants(renderer, preset)
    seen: dict[str, list[Attributes]] = {name: [] for name in (TRUE, DRAFT, *variants)}
    edges: dict[str, list[float]] = {name: [] for name in seen}
    for example in held_out:
        low = renderer.draft_latent(example, preset)
        clips = {TRUE: true_video(example.scene, config, preset), DRAFT: renderer.decode(low)}
        clips |= {name: renderer.decode(run(example, low)) for name, run in variants.items()}
        for name, clip in clips.items():
            seen[name].append(classify(clip))
            edges[name].append(sharpness(enlarge(clip, config)))
    scenes = [example.scene for example in held_out]
    return tuple(
        Variant(
            name=name,
            adherence=shares(attributes, scenes),
            sharpness=mean(edges[name]),
            seen=tuple(attributes),
        )
        for name, attributes in seen.items()
    )


def shares(seen: list[Attributes], scenes: list[Scene]) -> dict[str, float]:
    """Return the share of clips whose colour, shape and motion are as the captions say."""
    correct = [matches(attributes, scene) for attributes, scene in zip(seen, scenes, strict=True)]
    return {name: mean([float(clip[name]) for clip in correct]) for name in ATTRIBUTES}


def reconstruction(renderer: Renderer, preset: Preset, count: int) -> tuple[Likeness, ...]:
    """Pass true renderings through encoder and decoder, at the sizes of both stages."""
    likenesses = []
    for config in (preset.draft, highres_of(preset)):
        clips = [true_video(example.scene, config, preset) for example in examples(count)]
        back = [renderer.decode(renderer.encode(clip)) for clip in clips]
        likenesses.append(likeness(f"{config.width}x{config.height}", back, clips))
    return tuple(likenesses)


def from_true_drafts(renderer: Renderer, preset: Preset, count: int) -> tuple[Likeness, ...]:
    """Make high-res clips of true drafts, beside those drafts enlarged."""
    config, variants = highres_of(preset), highres_variants(renderer, preset)
    clips: dict[str, list[Tensor]] = {name: [] for name in ("draft enlarged", *variants)}
    true = []
    for example in examples(count):
        low = renderer.encode(true_video(example.scene, preset.draft, preset))
        true.append(true_video(example.scene, config, preset))
        clips["draft enlarged"].append(enlarge(renderer.decode(low), config))
        for name, run in variants.items():
            clips[name].append(renderer.decode(run(example, low)))
    return tuple(likeness(name, videos, true) for name, videos in clips.items())


def likeness(name: str, videos: list[Tensor], true: list[Tensor]) -> Likeness:
    """Compare videos, pair by pair."""
    ratios = [psnr(*pair) for pair in zip(videos, true, strict=True)]
    similarities = [ssim(*pair) for pair in zip(videos, true, strict=True)]
    return Likeness(
        name=name,
        psnr=tuple(round(ratio, 3) for ratio in ratios),
        ssim=tuple(round(similarity, 4) for similarity in similarities),
        mean_psnr=mean(ratios),
        mean_ssim=mean(similarities),
        sharpness=mean([sharpness(video) for video in videos]),
    )


def highres_of(preset: Preset) -> StageConfig:
    """Return the high-res stage of a preset that has one."""
    assert preset.highres is not None
    return preset.highres


def true_video(scene: Scene, config: StageConfig, preset: Preset) -> Tensor:
    """Render [3, F, height, width] as the caption means it, at the size of a stage."""
    return render(scene, config.width, config.height, preset.video.frames)


def enlarge(video: Tensor, config: StageConfig) -> Tensor:
    """Resize the video to the size of a stage, bilinearly."""
    size = (config.height, config.width)
    frames = video.transpose(0, 1)
    resized = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    return resized.transpose(0, 1)


def mean(values: list[float]) -> float:
    """Return the mean, rounded to six digits; more are noise."""
    return round(sum(values) / len(values), 6)
