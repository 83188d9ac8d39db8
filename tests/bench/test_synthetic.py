# SPDX-License-Identifier: Apache-2.0
"""Random weights in memory make clips like any others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pw_bench.e2e.synthetic import synthetic_bundle
from pw_export.nano import NANO_DIT, NANO_HIGHRES, NANO_TEXT_ENCODER, NANO_VAE
from pw_export.wan22_configs import NETWORKS
from pw_runtime.checkpoint.bundle import load_tensors
from pw_runtime.pipeline import generate
from pw_runtime.presets import PRESETS
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Prompt, Request, StageConfig, VideoConfig

SMALL = replace(
    NETWORKS,
    draft=replace(NETWORKS.draft, config=NANO_DIT),
    highres=replace(NETWORKS.highres, config=NANO_HIGHRES),
    vae=replace(NETWORKS.vae, config=NANO_VAE),
    text_encoder=replace(NETWORKS.text_encoder, config=NANO_TEXT_ENCODER),
)


def test_weights_in_memory_make_a_clip(tmp_path: Path) -> None:
    stage = StageConfig(width=64, height=64, steps=2, shift=5.0, guidance=5.0)
    preset = replace(
        PRESETS["nano"], draft=stage, highres=replace(stage, width=96), video=VideoConfig(frames=5)
    )
    bundle = synthetic_bundle(tmp_path / "bundle", SMALL)
    prompt = Prompt(id="0", text="a red ball", position=1)
    request = Request(prompts=(prompt,), preset=preset, out=tmp_path / "out")
    (outcome,) = generate(request, bundle, Reporter(quiet=True))
    assert outcome.error is None
    assert outcome.video is not None
    assert outcome.video.stat().st_size > 0
    assert not [*bundle.root.rglob("*.safetensors")]


def test_the_same_weights_every_time_in_the_dtypes_of_checkpoints(tmp_path: Path) -> None:
    a, b = (load_tensors(synthetic_bundle(tmp_path / name, SMALL), "draft") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {x.dtype for x in a.values()} == {torch.bfloat16}
    vae = load_tensors(synthetic_bundle(tmp_path / "c", SMALL), "vae", prefix=("decoder.",))
    assert {x.dtype for x in vae.values()} == {torch.float32}
