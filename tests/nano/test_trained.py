# SPDX-License-Identifier: Apache-2.0
"""The weights that come with the package: small, those of the card, and they draw what is said."""

from __future__ import annotations

import re

import pytest
import torch

from pw_bench.quality.gate import Highres, highres_variants
from pw_bench.quality.measure import classify, matches
from pw_bench.quality.render import Renderer, examples, load_renderer
from pw_export.nano.weights import FILES, TRAINED, write_trained_checkpoint
from pw_runtime.checkpoint.bundle import sha256_of
from pw_runtime.presets import PRESETS
from tests.convert.layouts import quietly


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("trained")
    write_trained_checkpoint(folder / "checkpoint")
    checkpoint = folder / "checkpoint"
    return load_renderer(
        quietly(folder / "bundle", wan=checkpoint, highres=checkpoint / "pixelwizard/highres.pt")
    )


def test_card_has_the_digests_of_the_files() -> None:
    card = (TRAINED / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `(\w+)\.safetensors` .*`([0-9a-f]{64})`", card, re.MULTILINE))
    files = {name: TRAINED / f"{name}.safetensors" for name in FILES}
    assert stated == {name: sha256_of(file) for name, file in files.items()}
    assert sum(file.stat().st_size for file in files.values()) <= 24e6


@pytest.mark.slow
def test_clips_of_held_out_captions_show_what_they_say(renderer: Renderer) -> None:
    preset, held_out = PRESETS["nano"], examples(3)
    highres: Highres = highres_variants(renderer, preset)["4 steps"]
    correct = []
    with torch.inference_mode():
        for example in held_out:
            latent = highres(example, renderer.draft_latent(example, preset))
            correct.append(matches(classify(renderer.decode(latent)), example.scene))
    assert sum(all(attributes.values()) for attributes in correct) >= 2
