# SPDX-License-Identifier: Apache-2.0
"""The weights in the package are small, match their card, and draw what captions say."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pw_bench.quality.gate import Highres, highres_variants
from pw_bench.quality.measure import classify, matches
from pw_bench.quality.render import Renderer, examples, load_renderer
from pw_export.nano.weights import FILES, TRAINED, write_trained_checkpoint
from pw_runtime import LoraFile, Reporter, Request, RunOptions, generate, with_loras
from pw_runtime.checkpoint.bundle import Bundle, sha256_of
from pw_runtime.presets import PRESETS
from pw_runtime.prompts import make_prompts
from pw_runtime.types import StageName
from tests.convert.layouts import quietly

LORAS = ("lora_draft", "lora_highres")
STAGES: tuple[StageName, ...] = ("draft", "highres")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("trained")
    write_trained_checkpoint(folder / "checkpoint")
    checkpoint = folder / "checkpoint"
    highres = checkpoint / "pixelwizard/highres.pt"
    return quietly(folder / "bundle", wan=checkpoint, highres=highres)


@pytest.fixture(scope="module")
def renderer(bundle: Bundle) -> Renderer:
    return load_renderer(bundle)


def test_card_has_the_digests_of_the_files() -> None:
    card = (TRAINED / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)\.safetensors` .*`([0-9a-f]{64})`", card, re.MULTILINE))
    files = {name: TRAINED / f"{name}.safetensors" for name in (*FILES, *LORAS)}
    assert listed == {name: sha256_of(file) for name, file in files.items()}
    assert sum(files[name].stat().st_size for name in FILES) <= 40e6
    assert sum(files[name].stat().st_size for name in LORAS) <= 300e3


@pytest.mark.slow
def test_the_lora_makes_a_poster_of_a_night(bundle: Bundle, tmp_path: Path) -> None:
    """White paper above a black ground, where the text says night; the blue shape stays."""
    request = Request(
        prompts=make_prompts([("0", "a big blue box moves left at night")]),
        preset=PRESETS["nano"],
        out=tmp_path,
        options=RunOptions(device="cpu", codec="ffv1"),
    )
    files = {stage: [LoraFile(TRAINED / f"lora_{stage}.safetensors")] for stage in STAGES}
    (outcome,) = generate(request, with_loras(bundle, files), Reporter(quiet=True))
    assert outcome.video is not None
    with av.open(str(outcome.video)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    sky, ground = frames[:, :16].mean(), frames[:, -16:].mean()
    assert sky > 180
    assert ground < 60
    red, _, blue = (frames[..., channel].astype(int) for channel in range(3))
    assert (blue - red > 80).mean() > 0.03


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
