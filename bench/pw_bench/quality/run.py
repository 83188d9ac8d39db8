# SPDX-License-Identifier: Apache-2.0
"""Measure the built-in model on held-out captions and scenes.

pw bench quality --model BUNDLE --preset nano --out bench/results/quality-nano.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pw_bench.measure.environment import envelope, identify, usual_operations
from pw_bench.quality.gate import (
    USUAL,
    adherence,
    fewer_steps,
    from_true_drafts,
    hard_captions,
    highres_of,
    highres_variants,
    reconstruction,
)
from pw_bench.quality.plots import write_sheets
from pw_bench.quality.render import examples, load_renderer
from pw_bench.result_sections import Attributes, Quality
from pw_bench.results import Result
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.presets import find_preset


def measure_quality(
    model: Path,
    preset_name: str,
    *,
    captions: int,
    clips: int,
    sheet: Path | None,
    usual_only: bool = False,
) -> Result:
    """Measure what clips of the built-in model show.

    Args:
        model: bundle.
        preset_name: as for `pw generate`; with a high-res stage.
        captions: number of held-out captions.
        clips: number of true renderings, for what has a ground truth.
        sheet: PNG to write, with frames of eight captions.
        usual_only: high-res clips as `pw generate` makes them, in no other number of steps and with
            all parts.

    Raises BadRequest, BadWeights.
    """
    bundle, preset = open_bundle(model), find_preset(preset_name)
    highres_of(preset)  # refused now, not after the first clips
    cpu = torch.device("cpu")
    identity = identify(cpu, operations=usual_operations(cpu))
    held_out = examples(captions)
    with torch.inference_mode():
        renderer = load_renderer(bundle)
        variants = highres_variants(renderer, preset)
        if usual_only:
            variants = {USUAL: variants[USUAL]}
        if sheet is not None:
            write_sheets(renderer, preset, held_out[:8], sheet)
        quality = Quality(
            preset=preset,
            captions=tuple(example.text for example in held_out),
            expected=tuple(
                Attributes(scene.colour, scene.shape, scene.motion)
                for scene in (example.scene for example in held_out)
            ),
            variants=adherence(renderer, preset, held_out, variants),
            reconstruction=reconstruction(renderer, preset, clips),
            hard_captions=hard_captions(renderer, preset, (captions + 1) // 2),
            fewer_steps=() if usual_only else fewer_steps(renderer, preset, clips),
            from_true_drafts=from_true_drafts(renderer, preset, clips, variants),
        )
    scope = {
        "words": "clips of held-out captions and scenes, by the stages of the runtime, eager",
        "preset": preset_name,
        "captions": str(captions),
        "true renderings": str(clips),
        "precision": "fp32",
        "device": "cpu",
    }
    weights = {model.name: f"sha256:{bundle.digest}"}
    return replace(envelope("quality", scope, replace(identity, weights=weights)), quality=quality)
