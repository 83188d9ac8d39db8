# SPDX-License-Identifier: Apache-2.0
"""How good the built-in model is: reconstruction, adherence to captions, and what helps.

python -m pw_export.nano.quality --model BUNDLE --out quality.json [--sheet sheet.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pw_export.nano.measure import look_at, psnr, sharpness, ssim
from pw_export.nano.runs import Example, Studio, examples, open_studio
from pw_export.nano.scenes import render
from pw_runtime.atomic import atomic_file, write_text
from pw_runtime.bundle import Bundle, load_tensors, open_bundle
from pw_runtime.models.vae import VaeEncoder
from pw_runtime.presets import find_preset
from pw_runtime.types import Latent, Preset, StagePlan

PARTS = ("colour", "shape", "motion")
SHEET_ROWS = 8
Paint = Callable[[Example, Latent], Latent]


def reconstruction(bundle: Bundle, studio: Studio, preset: Preset, count: int) -> dict[str, float]:
    """Mean PSNR in dB and SSIM of held-out scenes through encoder and decoder."""
    assert preset.highres is not None
    encoder = VaeEncoder(bundle.networks.vae.config)
    weights = load_tensors(bundle, "vae", prefix=("encoder.", "conv1."))
    encoder.load_state_dict(weights)
    ratios, likenesses = [], []
    for example in examples(count):
        clip = _true(example, preset.highres, preset.video.frames)
        back = studio.frames(Latent(x=encoder.requires_grad_(False)(clip)))
        ratios.append(psnr(clip, back))
        likenesses.append(ssim(clip, back))
    return {"clips": count, "psnr": _mean(ratios), "ssim": _mean(likenesses)}


def adherence(
    studio: Studio, preset: Preset, shown: list[Example], sheet: Path | None
) -> dict[str, object]:
    """Shares of clips whose colour, shape and motion are as the caption says, by way of making."""
    assert preset.highres is not None
    frames, ways = preset.video.frames, _ways(studio, preset)
    right: dict[str, list[dict[str, bool]]] = {name: [] for name in ("true", "draft", *ways)}
    edges: dict[str, list[float]] = {"true": [], "draft enlarged": [], "4 steps": []}
    rows: list[Tensor] = []
    for example in shown:
        low = studio.draft_of(example, preset)
        clips = {"draft": studio.frames(low), "true": _true(example, preset.highres, frames)}
        clips |= {name: studio.frames(paint(example, low)) for name, paint in ways.items()}
        for name, clip in clips.items():
            right[name].append(look_at(clip).agrees(example.scene))
        enlarged = _enlarged(clips["draft"], preset.highres)
        for name, clip in (("true", clips["true"]), ("draft enlarged", enlarged)):
            edges[name].append(sharpness(clip))
        edges["4 steps"].append(sharpness(clips["4 steps"]))
        if len(rows) < SHEET_ROWS:
            rows.append(_row(enlarged, clips["4 steps"], clips["true"]))
    if sheet is not None:
        _write_picture(torch.cat(rows, dim=1), sheet)
    shares = {
        name: {part: _mean([float(one[part]) for one in found]) for part in PARTS}
        for name, found in right.items()
    }
    sharp = {name: _mean(values, 6) for name, values in edges.items()}
    return {"captions": len(shown), "adherence": shares, "sharpness": sharp}


def _ways(studio: Studio, preset: Preset) -> dict[str, Paint]:
    """The high-res stage as it is meant, with other numbers of steps, and with parts left out."""
    nets = {f"{steps} steps": (studio.highres, steps) for steps in (1, 2, 4, 8)}
    nets |= {"no dt": (studio.no_step, 4), "no adapter": (studio.no_adapter, 4)}

    def way(name: str) -> Paint:
        net, steps = nets[name]
        return lambda example, low: studio.paint(example, low, preset, net, steps)

    return {name: way(name) for name in nets}


def _true(example: Example, plan: StagePlan, frames: int) -> Tensor:
    return render(example.scene, plan.width, plan.height, frames)


def _enlarged(clip: Tensor, plan: StagePlan) -> Tensor:
    size = (plan.height, plan.width)
    grown = F.interpolate(clip.transpose(0, 1), size=size, mode="bilinear", align_corners=False)
    return grown.transpose(0, 1)


def _row(*clips: Tensor) -> Tensor:
    """First, middle and last frame of each clip side by side: [3, height, 9 width]."""
    picked = [clip[:, index] for clip in clips for index in (0, clip.shape[1] // 2, -1)]
    return torch.cat(picked, dim=2)


def _write_picture(picture: Tensor, path: Path) -> None:
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with atomic_file(path) as partial:
        Image.fromarray(np.ascontiguousarray(pixels)).save(partial, format="png")


def _mean(values: list[float], digits: int = 4) -> float:
    return round(sum(values) / len(values), digits)


def main() -> None:
    """Run `python -m pw_export.nano.quality`."""
    parser = argparse.ArgumentParser(description="Measure the built-in model.")
    parser.add_argument("--model", type=Path, required=True, help="its bundle")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--sheet", type=Path, help="picture of draft, high-res and true frames")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--clips", type=int, default=16, help="for the reconstruction")
    given = parser.parse_args()
    bundle, preset = open_bundle(given.model), find_preset(given.preset)
    with torch.inference_mode():
        studio = open_studio(bundle)
        report: dict[str, object] = {"preset": given.preset}
        report["reconstruction"] = reconstruction(bundle, studio, preset, given.clips)
        report |= adherence(studio, preset, examples(given.captions), given.sheet)
    write_text(given.out, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
