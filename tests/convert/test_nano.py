# SPDX-License-Identifier: Apache-2.0
"""The built-in model is an ordinary checkpoint, the same every time, and draws something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pw_export.nano import (
    NANO_DIT,
    NANO_HIGHRES,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    write_nano_checkpoint,
)
from pw_export.nano.__main__ import main as write_nano
from pw_runtime.checkpoint.bundle import Bundle, sha256_of, verify
from pw_runtime.checkpoint.loader import load_decoder, load_dit
from pw_runtime.errors import BadRequest
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.stages.decode import decode_frames
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.types import CHUNK, Compat, StageConfig, TextContext, TilingConfig
from tests.convert.layouts import SHARDS, T5, VAE, quietly
from tests.networks import TINY_VAE

SMALL_DIT = replace(NANO_DIT, dim=64, ffn_dim=64, num_heads=2, num_layers=1)
SMALL_HIGHRES = replace(SMALL_DIT, has_dt=True, adapter_dim=16, control_blocks=(0,))


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "checkpoint"
    write_nano_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(nano: Path) -> Bundle:
    return quietly(nano.parent / "bundle", wan=nano, highres=nano / "pixelwizard" / "highres.pt")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256_of(file)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_module_refuses_a_folder_that_exists_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pw_export.nano", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        write_nano()
    assert ended.value.code == 2
    assert "exists" in capsys.readouterr().err


def test_nano_checkpoint_converts_to_the_stated_networks(bundle: Bundle) -> None:
    verify(bundle)
    networks = bundle.networks
    assert networks.draft.config == NANO_DIT
    assert networks.highres is not None
    assert networks.highres.config == NANO_HIGHRES
    assert networks.vae.config == NANO_VAE
    assert networks.text_encoder.config == NANO_TEXT_ENCODER


def test_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_nano_checkpoint(
            tmp_path / name, seed, dit=SMALL_DIT, highres=SMALL_HIGHRES, vae=TINY_VAE
        )
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    differing = {
        name
        for name, digest in digests(tmp_path / "three").items()
        if digest != digests(tmp_path / "one")[name]
    }
    assert differing == {*SHARDS, VAE, T5, "pixelwizard/highres.pt"}


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="exists already"):
        write_nano_checkpoint(tmp_path, dit=SMALL_DIT, highres=SMALL_HIGHRES, vae=TINY_VAE)


@pytest.mark.parametrize("text", ["a fox", " two  spaces\n", "雪の中の狐 🦊", ""])
def test_tokenizer_has_one_token_per_byte_and_gives_the_text_back(text: str, nano: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano / "google" / "umt5-xxl", local_files_only=True)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) + 1
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id == 2
    assert max(ids) < NANO_TEXT_ENCODER.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_and_truncates_as_the_text_encoder_needs(nano: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano / "google" / "umt5-xxl", local_files_only=True)
    short = tokenizer("ab", padding="max_length", max_length=8, truncation=True).input_ids
    long = tokenizer("abcdefghij", padding="max_length", max_length=8, truncation=True).input_ids
    assert short[2:] == [1, 0, 0, 0, 0, 0]
    assert len(long) == 8
    assert long[-1] == 1


def test_clips_are_coloured_smooth_and_moving(bundle: Bundle) -> None:
    """Grey, saturated, noisy or frozen output would make a demo that shows nothing."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    text = TextContext(
        cond=torch.randn(20, 64, generator=generator),
        uncond=torch.randn(300, 64, generator=generator),
    )
    plan = StageConfig(width=192, height=128, steps=10, shift=5.0, guidance=5.0)
    noise = torch.randn(48, 3, 8, 12, generator=generator)
    with torch.inference_mode():
        net = load_dit(bundle, "draft", "fp32", device)
        segments = segments_of(net.config, "fp32", CHUNK)
        on_engines = SegmentedDiT(net, segments, eager_engines(segments))
        latent = denoise_draft(on_engines, text, noise, plan, Compat(), lambda part: None)
    chunks = decode_frames(load_decoder(bundle, device), latent, TilingConfig(), Compat())
    video = torch.cat([chunk.frames for chunk in chunks]).float()  # [F, height, width, 3]
    assert video.shape == (9, 128, 192, 3)
    assert video.std(dim=(1, 2)).mean() > 10
    assert ((video == 0) | (video == 255)).float().mean() < 0.3
    assert video.diff(dim=1).abs().mean() < 3
    assert 0.1 < video.diff(dim=0).abs().mean() < 12
