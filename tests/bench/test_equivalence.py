# SPDX-License-Identifier: Apache-2.0
"""Comparison of clips: latents, frames and the label of their difference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pw_bench.clips.equivalence import (
    ROUNDING,
    Output,
    compare_frames,
    compare_outputs,
    step_differences,
    tile_borders,
)
from pw_runtime.errors import BadResult
from pw_runtime.presets import PRESETS
from pw_runtime.stages.write import write_video
from pw_runtime.types import FrameChunk, TilingConfig, VideoConfig

SIZE = (9, 48, 64)
PRESET = replace(
    PRESETS["nano"],
    draft=replace(PRESETS["nano"].draft, steps=2),
    highres=replace(PRESETS["nano"].draft, width=64, height=48, steps=1),
    video=VideoConfig(frames=9),
)


def moving(seed: int = 0) -> Tensor:
    noise = torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(seed)) * 20
    ramp = torch.linspace(0, 200, SIZE[2]).view(1, 1, -1, 1)
    return (ramp + torch.arange(SIZE[0]).view(-1, 1, 1, 1) + noise).to(torch.uint8)


def written(frames: Tensor, path: Path) -> Path:
    chunk = FrameChunk(start=0, pixel_format="rgb24", frames=frames.contiguous())
    count, height, width, _ = frames.shape
    write_video([chunk], path, width=width, height=height, frames=count, fps=12, codec="ffv1")
    return path


def steps(factor: float = 1.0) -> dict[str, Tensor]:
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(3))
    return {f"latent {i:03}": x * i * factor for i in (1, 2, 3)}


def output(folder: Path, program: str, frames: Tensor, latents: dict[str, Tensor]) -> Output:
    save_file(latents, folder / f"{program}.safetensors")
    video = written(frames, folder / f"{program}.mkv")
    return Output(program=program, latents=folder / f"{program}.safetensors", video=video)


def test_equal_clips_are_bit_exact(tmp_path: Path) -> None:
    a, b = (output(tmp_path, name, moving(), steps()) for name in "ab")
    same = compare_outputs(a, b, PRESET, "fp32")
    assert (same.label, same.psnr, same.ssim, same.flicker_ratio) == ("bit-exact", None, 1, 1)
    assert [(s.stage, s.step) for s in same.steps] == [("draft", 1), ("draft", 2), ("highres", 1)]


def test_the_label_follows_the_last_latent_and_the_frames(tmp_path: Path) -> None:
    exact = output(tmp_path, "exact", moving(), steps())
    near = output(tmp_path, "near", moving(), steps(1 + ROUNDING["fp32"] / 2))
    far = output(tmp_path, "far", moving(), steps(1 + ROUNDING["fp32"] * 2))
    other = output(tmp_path, "other", moving(1), steps())
    labels = [compare_outputs(out, exact, PRESET, "fp32").label for out in (near, far, other)]
    assert labels == ["rounding", "approximate", "approximate"]


def test_psnr_is_that_of_its_formula(tmp_path: Path) -> None:
    frames = moving()
    difference = compare_frames(
        written(frames + 2, tmp_path / "a.mkv"), written(frames, tmp_path / "b.mkv")
    )
    assert difference.psnr == pytest.approx(10 * math.log10(255**2 / 4))
    assert difference.ssim > 0.99


def test_flicker_and_seams_are_detected(tmp_path: Path) -> None:
    frames = moving()
    flickering, seamed = frames.clone(), frames.clone()
    flickering[::2] += 20
    seamed[:, :, 32:] += 30
    plain = written(frames, tmp_path / "plain.mkv")
    flicker = compare_frames(written(flickering, tmp_path / "f.mkv"), plain, (32,))
    assert flicker.flicker_ratio > 2
    assert compare_frames(plain, plain, (32,)).seam_index == pytest.approx(1, abs=0.4)
    assert compare_frames(written(seamed, tmp_path / "s.mkv"), plain, (32,)).seam_index > 5


def test_videos_of_other_lengths_and_sizes_are_refused(tmp_path: Path) -> None:
    whole = written(moving(), tmp_path / "whole.mkv")
    for name, frames in (("short", moving()[:-1]), ("narrow", moving()[:, :, :48])):
        other = written(frames, tmp_path / f"{name}.mkv")
        for pair in ((whole, other), (other, whole)):
            with pytest.raises(BadResult, match=r"length|size"):
                compare_frames(*pair)


def test_other_numbers_of_steps_are_refused() -> None:
    with pytest.raises(BadResult, match="same steps"):
        step_differences(steps(), {"latent 001": torch.zeros(1)}, PRESET)


def test_borders_are_those_of_the_official_strips() -> None:
    assert tile_borders(PRESET) == ()
    assert tile_borders(replace(PRESETS["2k"], decode=TilingConfig(strips=3))) == (848, 1696)


def test_static_clip_has_no_flicker_ratio(tmp_path: Path) -> None:
    still = moving()[:1].expand(*SIZE, 3)
    other, plain = written(moving(), tmp_path / "a.mkv"), written(still, tmp_path / "b.mkv")
    assert compare_frames(other, plain).flicker_ratio is None


def test_latents_that_are_not_finite_are_refused() -> None:
    broken = steps() | {"latent 002": torch.full((3, 2, 4), torch.nan)}
    for pair in ((broken, steps()), (steps(), broken)):
        with pytest.raises(BadResult, match="latent 002 is not finite"):
            step_differences(*pair, PRESET)
