# SPDX-License-Identifier: Apache-2.0
"""The quality of the built-in model in numbers: adherence to captions, and detail."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from pw_bench.quality.measure import (
    ATTRIBUTES,
    classify,
    classify_each,
    matches,
    psnr,
    sharpness,
    ssim,
)
from pw_bench.quality.render import HARD, Example, Renderer, examples
from pw_bench.result_sections import Attributes, HardCaptions, Likeness, Variant
from pw_export.nano.scenes import Scene, render
from pw_runtime.errors import BadRequest
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.types import Latent, Preset, StageConfig

TRUE, DRAFT, USUAL = "true renderings", "draft", "4 steps"
MANY = 16  # steps, after which a high-res clip hardly changes with more
FEWER = {"1 step": 1, "2 steps": 2, "4 steps": 4, "8 steps": 8}

Highres = Callable[[Example, Latent], Latent]
"""A draft latent of an example -> a high-res latent."""


def highres_variants(renderer: Renderer, preset: Preset) -> dict[str, Highres]:
    """Return the high-res stage in 4 steps, in other numbers of them, and with parts disabled."""
    counts = {USUAL: 4} | FEWER  # the usual number first
    networks = {name: (renderer.highres, steps) for name, steps in counts.items()}
    networks |= {"no dt": (renderer.no_dt, 4), "no adapter": (renderer.no_adapter, 4)}

    def variant(name: str) -> Highres:
        net, steps = networks[name]
        return lambda example, low: renderer.highres_latent(example, low, preset, net, steps)

    return {name: variant(name) for name in networks}


def adherence(
    renderer: Renderer,
    preset: Preset,
    held_out: list[Example],
    variants: Mapping[str, Highres],
) -> tuple[Variant, ...]:
    """Make the clips of captions in every variant and classify them."""
    config = highres_of(preset)
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


def hard_captions(renderer: Renderer, preset: Preset, count: int) -> tuple[HardCaptions, ...]:
    """Make the clips of captions of each HARD group and look for every object in them."""
    config, results = highres_of(preset), []
    run = highres_variants(renderer, preset)[USUAL]
    for group in HARD:
        seen: dict[str, list[dict[str, Attributes]]] = {TRUE: [], DRAFT: [], USUAL: []}
        held_out = examples(count, group)
        for example in held_out:
            low = renderer.draft_latent(example, preset)
            clips = (
                true_video(example.scene, config, preset),
                renderer.decode(low),
                renderer.decode(run(example, low)),
            )
            for found, clip in zip(seen.values(), clips, strict=True):
                found.append(classify_each(clip))
        scenes = [example.scene for example in held_out]
        results += [
            HardCaptions(
                group=group, variant=name, captions=count, shares=found_shares(all_, scenes)
            )
            for name, all_ in seen.items()
        ]
    return tuple(results)


def found_shares(seen: list[dict[str, Attributes]], scenes: list[Scene]) -> dict[str, float]:
    """Return the shares of objects found, in the right shape, in the right direction.

    "clip" is the share of clips with all of that and nothing else.
    """
    objects = [(o, found) for s, found in zip(scenes, seen, strict=True) for o in _objects(s)]
    own = [(o, found.get(o.colour)) for o, found in objects]
    right = [matches(a, o) if a is not None else dict.fromkeys(ATTRIBUTES, False) for o, a in own]
    shares = {"present": mean([float(a is not None) for _, a in own])}
    shares |= {name: mean([float(r[name]) for r in right]) for name in ("shape", "motion")}
    whole = [
        set(found) == {o.colour for o in _objects(scene)}
        and all(all(matches(found[o.colour], o).values()) for o in _objects(scene))
        for scene, found in zip(scenes, seen, strict=True)
    ]
    return shares | {"clip": mean([float(w) for w in whole])}


def _objects(scene: Scene) -> list[Scene]:
    return [scene] if scene.other is None else [scene, scene.other]


def reconstruction(renderer: Renderer, preset: Preset, count: int) -> tuple[Likeness, ...]:
    """Pass true renderings through encoder and decoder, at the sizes of both stages."""
    likenesses = []
    for config in (preset.draft, highres_of(preset)):
        clips = [true_video(example.scene, config, preset) for example in examples(count)]
        back = [renderer.decode(renderer.encode(clip)) for clip in clips]
        likenesses.append(likeness(f"{config.width}x{config.height}", back, clips))
    return tuple(likenesses)


def from_true_drafts(
    renderer: Renderer, preset: Preset, count: int, variants: Mapping[str, Highres]
) -> tuple[Likeness, ...]:
    """Make high-res clips of true drafts, beside those drafts enlarged."""
    config = highres_of(preset)
    clips: dict[str, list[Tensor]] = {name: [] for name in ("draft enlarged", *variants)}
    true = []
    for example in examples(count):
        low = renderer.encode(true_video(example.scene, preset.draft, preset))
        true.append(true_video(example.scene, config, preset))
        clips["draft enlarged"].append(enlarge(renderer.decode(low), config))
        for name, run in variants.items():
            clips[name].append(renderer.decode(run(example, low)))
    return tuple(likeness(name, videos, true) for name, videos in clips.items())


def fewer_steps(renderer: Renderer, preset: Preset, count: int) -> tuple[Likeness, ...]:
    """Compare high-res clips in few steps with those in MANY, from the same draft and noise."""
    networks = {"": renderer.highres, ", no dt": renderer.no_dt}
    clips: dict[str, list[Tensor]] = {n + end: [] for end in networks for n in FEWER}
    many = []
    for example in examples(count):
        low = renderer.draft_latent(example, preset)

        def clip(net: SegmentedDiT, steps: int, low: Latent = low, of: Example = example) -> Tensor:
            return renderer.decode(renderer.highres_latent(of, low, preset, net, steps))

        many.append(clip(renderer.highres, MANY))
        for end, net in networks.items():
            for name, steps in FEWER.items():
                clips[name + end].append(clip(net, steps))
    return tuple(likeness(name, videos, many) for name, videos in clips.items())


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
    """Return the high-res stage of a preset. Raises BadRequest where it has none."""
    if preset.highres is None:
        raise BadRequest(
            "this is measured on clips of the high-res stage",
            got="a preset without one",
            do="choose another --preset: nano, for instance",
        )
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
