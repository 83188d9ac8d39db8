# SPDX-License-Identifier: Apache-2.0
"""`pw convert` and `pw generate` against a direct composition of the official recipe.

The oracle (pw_bench.official) was written from the specification alone and shares no code with
the runtime.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pw_runtime.presets import read_preset
from tests.closeness import max_abs
from tests.e2e.pw import Pw, latent_shapes, write_preset
from tests.oracle.checkpoint import Checkpoint
from tests.oracle.recipe import run_official

PROMPT = "a red   ball &amp;amp; a cat"
NEGATIVE = "blurry"


def make_noise(path: Path, frames: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    noise = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in latent_shapes(frames).items()
    }
    save_file(noise, path)
    return noise


def read_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize(
    ("solver", "strips", "with_draft"), [("unipc", 3, False), ("dpm++", 2, True)]
)
def test_converted_official_checkpoint_reproduces_the_official_recipe(
    pw: Pw, checkpoint: Checkpoint, tmp_path: Path, solver: str, strips: int, with_draft: bool
) -> None:
    frames, steps = 9, (6, 4)
    noise = make_noise(tmp_path / "noise.safetensors", frames)
    preset = write_preset(
        tmp_path / "p.toml",
        draft_steps=steps[0],
        highres_steps=steps[1],
        solver=solver,
        frames=frames,
        tiling="official",
        strips=strips,
        truncating="true",
    )
    draft = ["--draft", checkpoint.draft] if with_draft else []
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    converted = pw(
        "convert", "--wan", checkpoint.base, "--highres", checkpoint.highres, *draft,
        "--out", bundle,
    )  # fmt: skip
    assert converted.code == 0, converted.err
    made = pw(
        "generate", "--model", bundle, "--prompt", PROMPT, "--negative", NEGATIVE,
        "--preset", preset, "--noise", tmp_path / "noise.safetensors", "--codec", "ffv1",
        "--save-latents", "--out", out,
    )  # fmt: skip
    assert made.code == 0, made.err

    numbers = read_preset(preset)
    assert numbers.highres is not None
    wanted = run_official(
        checkpoint.base,
        checkpoint.highres,
        PROMPT,
        NEGATIVE,
        draft=numbers.draft,
        highres=numbers.highres,
        frames=frames,
        draft_pt=checkpoint.draft if with_draft else None,
        strips=strips,
        overlap=3,
        **noise,
    )
    got = load_file(out / "0.latents.safetensors")
    assert torch.equal(got["draft_noise"], noise["draft_noise"])
    assert torch.equal(got["highres_noise"], noise["highres_noise"])
    for name in ("text_context", "negative_context", "draft_latent", "highres_latent"):
        assert max_abs(got[name], wanted[name]) <= 1e-4, name
    pictures = read_frames(out / "0.mkv").astype(int)
    assert np.abs(pictures - wanted["frames"].numpy().astype(int)).max() <= 1


def test_saved_latents_reproduce_the_run(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    """--noise with the file of an earlier run gives the same bytes, whatever the seed."""
    common = ("generate", "--model", bundle_dir, "--preset", preset, "--codec", "ffv1")
    first, second = tmp_path / "first", tmp_path / "second"
    assert pw(*common, "--prompt", "cat", "--save-latents", "--out", first).code == 0
    noise = first / "0.latents.safetensors"
    again = pw(*common, "--prompt", "cat", "--noise", noise, "--seed", 99, "--out", second)
    assert again.code == 0, again.err
    assert (read_frames(first / "0.mkv") == read_frames(second / "0.mkv")).all()
