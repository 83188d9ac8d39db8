# SPDX-License-Identifier: Apache-2.0
"""Config files and tensor names with impossible numbers are refused before anything is built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pw_runtime.errors import BadWeights
from tests.convert.layouts import T5, VAE, edit_json, official_state, quietly, write_diffusers
from tests.oracle.checkpoint import Checkpoint

SIZES = (-3, 0, 2_000_006, 10**30, 2.5, True, "3", [])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the checkpoint in the diffusers layout."""
    return write_diffusers(tmp_path_factory.mktemp("diffusers") / "wan", checkpoint.base)


def refused(wan: Path, out: Path, file: str, **sources: Any) -> str:
    with pytest.raises(BadWeights) as caught:
        quietly(out, wan=wan, **sources)
    message = str(caught.value)
    assert file in message
    assert "do this: " in message
    return message


@pytest.mark.parametrize("value", SIZES)
@pytest.mark.parametrize("field", ["num_heads", "num_layers", "dim", "text_len", "freq_dim"])
def test_sizes_of_the_official_config_have_bounds(
    field: str, value: object, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = shutil.copytree(checkpoint.base, tmp_path / "wan")
    edit_json(wan / "config.json", **{field: value})
    assert f"got: {field}: " in refused(wan, tmp_path / "b", "config.json cannot be used")


@pytest.mark.parametrize(
    ("network", "field", "value"),
    [
        *[("transformer", "num_attention_heads", value) for value in SIZES],
        *[("text_encoder", "num_layers", value) for value in SIZES],
        *[("text_encoder", "relative_attention_max_distance", value) for value in SIZES],
        *[("vae", "z_dim", value) for value in SIZES],
        ("vae", "dim_mult", [1, 2, 4, 10**9]),
        *[("vae", "latents_mean", [value] * 48) for value in (NAN, INF, -INF, 1e30, "0")],
        *[("vae", "latents_std", [value] * 48) for value in (NAN, INF, 0.0, -1.0, 1e-300)],
        *[("transformer", "eps", value) for value in (NAN, INF, 0.0, -1e-6, 1.0)],
        *[("text_encoder", "layer_norm_epsilon", value) for value in (NAN, INF, 0.0, -1e-6)],
    ],
)
def test_numbers_of_the_diffusers_configs_have_bounds(
    network: str, field: str, value: object, theirs: Path, tmp_path: Path
) -> None:
    wan = tmp_path / "wan"
    wan.mkdir()
    for entry in theirs.iterdir():
        (wan / entry.name).symlink_to(entry)
    (wan / network).unlink()
    (wan / network).mkdir()
    for entry in (theirs / network).iterdir():
        (wan / network / entry.name).symlink_to(entry)
    (wan / network / "config.json").unlink()
    shutil.copy(theirs / network / "config.json", wan / network)
    edit_json(wan / network / "config.json", **{field: value})
    message = refused(wan, tmp_path / "b", f"{network}/config.json cannot be used")
    assert f"got: {field}" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"num_heads": 3, "x": "' + b"a" * 2**24 + b'"}',
    ],
    ids=["empty", "list", "UTF-16", "deep", "large"],
)
def test_config_file_that_is_no_config_is_refused(
    content: bytes, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = shutil.copytree(checkpoint.base, tmp_path / "wan")
    (wan / "config.json").write_bytes(content)
    refused(wan, tmp_path / "b", "config.json cannot be used")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["config.json", VAE, "google/umt5-xxl/tokenizer.json"])
def test_named_pipe_is_refused_and_not_waited_for(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = shutil.copytree(checkpoint.base, tmp_path / "wan")
    (wan / name).unlink()
    os.mkfifo(wan / name)
    assert "a named pipe" in refused(wan, tmp_path / "b", name)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("draft", "blocks.2000006.modulation"),
        ("draft", f"blocks.{'9' * 5000}.modulation"),
        ("highres", f"spatial_adapter.zero_layers.{'9' * 200}.weight"),
        (T5, "blocks.2000006.norm1.weight"),
        (VAE, "encoder.downsamples.999999999.x"),
        (VAE, "decoder.upsamples.0.upsamples.99999999.residual.0.gamma"),
    ],
)
def test_number_in_a_name_that_would_build_millions_of_blocks_is_refused(
    place: str, name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Seen: a text encoder of 2,000,006 layers was built before it was refused."""
    wan, sources = checkpoint.base, {}
    if place in (T5, VAE):
        wan = shutil.copytree(checkpoint.base, tmp_path / "wan")
        state = torch.load(wan / place, weights_only=True)
        torch.save({**state, name: torch.zeros(4)}, wan / place)
    else:
        state = torch.load(checkpoint.highres, weights_only=True)["generator"]
        if place == "draft":
            state = official_state(checkpoint.base)["draft"]
        torch.save(
            {**state, f"{'model.' * (place == 'highres')}{name}": torch.zeros(4)}, tmp_path / place
        )
        sources = {place: tmp_path / place}
    message = refused(wan, tmp_path / "b", wan.name if place in (T5, VAE) else place, **sources)
    assert len(message) < 1500


@pytest.mark.parametrize("shape", [(0, 48, 1, 2, 2), (2**21, 48, 1, 2, 2)])
def test_tensor_of_an_impossible_size_is_refused_by_its_header(
    shape: tuple[int, ...], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = official_state(checkpoint.base)["draft"]
    state["patch_embedding.weight"] = torch.zeros(1).expand(shape)
    torch.save(state, tmp_path / "d.pt")
    message = refused(checkpoint.base, tmp_path / "b", "d.pt", draft=tmp_path / "d.pt")
    assert f"patch_embedding.weight: {list(shape)}" in message


@pytest.mark.parametrize("config", ["DitConfig", "VaeConfig", "TextEncoderConfig"])
def test_numbers_that_a_network_refuses_are_an_error_of_the_checkpoint(
    config: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**fields: object) -> None:
        raise ValueError("7 does not go with 3")

    monkeypatch.setattr(f"pw_export.checkpoints.configs.{config}", refuse)
    message = refused(checkpoint.base, tmp_path / "b", "do not describe a valid network")
    assert "7 does not go with 3" in message
