# SPDX-License-Identifier: Apache-2.0
"""The weights that come with the package: small, those of the card, and they draw what is said."""

from __future__ import annotations

import re

import pytest
import torch

from pw_bench.quality.gate import Paint, ways_to_paint
from pw_bench.quality.measure import look_at
from pw_bench.quality.render import Studio, examples, open_studio
from pw_export.nano.weights import FILES, TRAINED, write_trained_checkpoint
from pw_runtime.checkpoint.bundle import sha256_of
from pw_runtime.presets import PRESETS
from tests.convert.layouts import quietly


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("trained")
    write_trained_checkpoint(folder / "checkpoint")
    checkpoint = folder / "checkpoint"
    return open_studio(
        quietly(folder / "bundle", wan=checkpoint, highres=checkpoint / "pixelwizard/highres.pt")
    )


def test_card_has_the_digests_of_the_files() -> None:
    card = (TRAINED / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `(\w+)\.safetensors` .*`([0-9a-f]{64})`", card, re.MULTILINE))
    files = {name: TRAINED / f"{name}.safetensors" for name in FILES}
    assert stated == {name: sha256_of(file) for name, file in files.items()}
    assert sum(file.stat().st_size for file in files.values()) <= 24e6


@pytest.mark.slow
def test_clips_of_held_out_captions_show_what_they_say(studio: Studio) -> None:
    preset, shown = PRESETS["nano"], examples(3)
    paint: Paint = ways_to_paint(studio, preset)["4 steps"]
    with torch.inference_mode():
        clips = [studio.frames(paint(one, studio.draft_of(one, preset))) for one in shown]
    right = [look_at(clip).agrees(one.scene) for clip, one in zip(clips, shown, strict=True)]
    assert sum(all(one.values()) for one in right) >= 2
