# SPDX-License-Identifier: Apache-2.0
"""The same frames give the same file, whatever the CPU and whatever the memory held before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

from pw_runtime.stages import codecs
from pw_runtime.stages.codecs import RECIPES, encoder_options
from pw_runtime.system.machine import cpu_features
from tests.video.test_write import chunked, clip, save

# 24 frames of moving waves with grain, so that x264 has motion to follow through its macroblock
# tree. They are as wide as drafts are: 448 is no multiple of 128.
ENCODE = """
import sys
from pathlib import Path
import torch
from pw_runtime.stages.write import write_video
from pw_runtime.types import FrameChunk

t, y, x = (torch.arange(n) for n in (24, 128, 448))
t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1)
waves = 128 + 90 * torch.sin((x.view(-1, 1) + 3 * t) / 24) * torch.cos((y - 2 * t) / 19)
grain = 8 * torch.randn(waves.shape, generator=torch.Generator().manual_seed(0))
rgb = (waves + grain).clamp(0, 255).to(torch.uint8).repeat(1, 1, 1, 3)
chunk = FrameChunk(start=0, pixel_format="rgb24", frames=rgb)
write_video([chunk], Path(sys.argv[1]), width=448, height=128, frames=24, fps=24, codec="h264")
"""


def test_h264_does_not_depend_on_what_the_heap_held(tmp_path: Path) -> None:
    """Seen: x264's AVX-512 code gave several files, picked by what freed memory had held."""
    fills = ("0", "85", "170")  # glibc writes this byte into memory that is allocated or freed
    children = [
        subprocess.Popen(
            [sys.executable, "-c", ENCODE, str(tmp_path / fill)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_PERTURB_": fill},
        )
        for fill in fills
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    first, *others = [(tmp_path / fill).read_bytes() for fill in fills]
    assert all(other == first for other in others)


def test_ffv1_gives_the_same_file_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, "ffv1", chunked(clip()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_avx512_is_kept_from_x264_and_from_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "cpu_features", lambda: frozenset({"avx2", "avx512f"}))
    for codec, recipe in RECIPES.items():
        added = encoder_options(recipe).items() - recipe.options.items()
        expected = {("x264-params", "asm=AVX2,FMA3,BMI2,LZCNT")} if codec == "h264" else set()
        assert added == expected
    monkeypatch.setattr(codecs, "cpu_features", lambda: frozenset({"avx2"}))
    assert encoder_options(RECIPES["h264"]) == RECIPES["h264"].options


@pytest.mark.skipif(
    not {"avx2", "fma", "bmi2", "abm"} <= cpu_features(), reason="x264 would run what is not there"
)
def test_x264_knows_the_names_of_the_features_and_writes_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """libav only warns of a name that x264 does not know, and PyAV hides warnings."""
    monkeypatch.setattr(codecs, "cpu_features", lambda: frozenset())
    save(tmp_path / "auto", "h264", chunked(clip()))
    monkeypatch.setattr(codecs, "cpu_features", lambda: frozenset({"avx512f"}))
    av.logging.restore_default_callback()
    try:
        save(tmp_path / "avx2", "h264", chunked(clip()))
    finally:
        av.logging.set_level(None)  # silent, as PyAV begins
    log = capfd.readouterr().err
    assert "Error parsing option" not in log
    (used,) = [line for line in log.splitlines() if "using cpu capabilities" in line]
    assert {"AVX2", "FMA3", "BMI2"} <= set(used.split())
    assert "AVX512" not in used
    if "avx512f" not in cpu_features():
        assert (tmp_path / "auto").read_bytes() == (tmp_path / "avx2").read_bytes()
