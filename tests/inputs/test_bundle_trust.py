# SPDX-License-Identifier: Apache-2.0
"""What bundle.json declares is bounded, and checked before anything is built; what is hashed is
what is computed with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from pw_runtime.checkpoint import limits
from pw_runtime.checkpoint.bundle import (
    check_tensors,
    load_tensors,
    open_bundle,
    sha256_of,
    verify,
)
from pw_runtime.errors import BadWeights
from pw_runtime.types import DitConfig, Network, TextEncoderConfig

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


def config(network: str, **values: object) -> Change:
    return lambda content: content["networks"][network]["config"].update(values)


def element(network: str, name: str, value: object) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["networks"][network]["config"][name][3] = value

    return change


def record(name: str, **values: object) -> Change:
    entry = {"bytes": 1, "sha256": "0" * 64} | values
    return lambda content: content["files"].update({name: entry})


NAN = float("nan")
DECLARED: list[tuple[Change, str]] = [
    (element("vae", "latent_mean", NAN), "NaN|latent_mean"),
    (element("vae", "latent_mean", 1e30), "latent_mean has the value 1e+30"),
    (element("vae", "latent_std", 0.0), "latent_std has the value 0.0"),
    (element("vae", "latent_std", -1.0), "latent_std has the value -1.0"),
    (element("vae", "latent_std", 1e-30), "latent_std has the value 1e-30"),
    (element("vae", "latent_std", NAN), "NaN|latent_std"),
    (element("vae", "decoder_dims", 0), "decoder_dims is"),
    (element("vae", "decoder_dims", -16), "decoder_dims is"),
    (element("vae", "encoder_dims", 2**40), "encoder_dims is"),
    (config("vae", latent_mean=[0.0] * 47), "latent_mean has 47 values, wanted 48"),
    (config("vae", decoder_dims=[]), "decoder_dims is"),
    (config("vae", z_dim=16), "z_dim is 16, wanted 48"),
    (config("vae", z_dim=-48), "z_dim is -48"),
    (config("vae", decoder_blocks=10**9), "decoder_blocks is 1000000000"),
    (config("vae", temporal_downsample=[True] * 3), "temporal_downsample is"),
    (config("draft", num_heads=0), "heads"),
    (config("draft", num_heads=-2), "heads"),
    (config("draft", dim=-96), "dim is -96|heads"),
    (config("draft", dim=2**40), "dim is 1099511627776|heads"),
    (config("draft", num_layers=2_000_006), "num_layers is 2000006"),
    (config("draft", num_layers=-1), "num_layers is -1"),
    (config("draft", num_layers="4"), "num_layers"),
    (config("draft", num_layers=4.0), "num_layers"),
    (config("draft", num_layers=True), "num_layers"),
    (config("draft", num_layers=10**400), "num_layers"),
    (config("draft", ffn_dim=-1), "ffn_dim is -1"),
    (config("draft", in_dim=16), "in_dim is 16, wanted 48"),
    (config("draft", eps=NAN), "eps|NaN"),
    (config("draft", eps=1e9), "eps is 1000000000.0"),
    (config("draft", text_dim=7), "text_dim is 7, the encoder's is"),
    (config("draft", text_len=10**12), "text_len is"),
    (config("highres", text_len=17), "highres.config.text_len differs"),
    (config("highres", adapter_dim=-1), "adapter_dim is -1"),
    (config("highres", adapter_dim=24), "adapter_dim is 24, wanted a multiple of 16"),
    (config("highres", control_blocks=[99]), "control_blocks|no blocks"),
    (config("text_encoder", num_layers=2_000_006), "num_layers is 2000006"),
    (config("text_encoder", num_heads=0), "num_heads is 0"),
    (config("text_encoder", num_heads=7), "num_heads is 7"),
    (config("text_encoder", num_buckets=0), "num_buckets is 0"),
    (config("text_encoder", max_distance=1), "max_distance is 1"),
    (config("text_encoder", vocab_size=2**50), "vocab_size is"),
    (config("text_encoder", dim=0), "dim is 0"),
    (record("vae/a\0b"), "files has the name"),
    (record("vae/a\x1b[2Jb"), "files has the name"),
    (record("a" * 2000), "files has the name"),
    (record("vae/x", bytes=-1), "files.vae/x has no size"),
    (record("vae/x", sha256="0"), "files.vae/x has no size in bytes and SHA-256"),
    (record("vae/x", sha256=5), "sha256"),
    (lambda content: content.update(networks=[]), "networks"),
    (lambda content: content.update(files=None), "files"),
    (lambda content: content.update(format=2), "format"),
]


@pytest.mark.parametrize("number", range(len(DECLARED)))
def test_a_declaration_that_cannot_be_is_one_error(bundle: Path, number: int) -> None:
    change, says = DECLARED[number]
    content = json.loads((bundle / "bundle.json").read_text())
    change(content)
    (bundle / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BadWeights, match=r"cannot be used|cannot be part") as caught:
        open_bundle(bundle)
    assert any(part in str(caught.value) for part in says.split("|"))
    assert len(str(caught.value)) < 2000


def test_every_number_of_a_config_has_a_bound() -> None:
    for kind in (DitConfig, TextEncoderConfig):
        numbers = {field.name for field in fields(kind) if field.type in ("int", "float")}
        assert numbers == limits._BOUNDS[kind].keys()


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a":' * 10_000, "null", '"x"', "\xff"])
def test_a_manifest_that_is_no_object_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadWeights, match="cannot be used"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("network", ["draft", "text_encoder"])
@pytest.mark.parametrize("layers", [1, 512])
def test_layers_are_counted_in_the_files_before_anything_is_built(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, network: Network, layers: int
) -> None:
    content = json.loads((bundle / "bundle.json").read_text())
    content["networks"][network]["config"]["num_layers"] = layers
    (bundle / "bundle.json").write_text(json.dumps(content))
    monkeypatch.setattr("pw_runtime.models.expected_shapes", None)
    with pytest.raises(BadWeights, match=f"wanted: tensors of {layers} layers"):
        check_tensors(open_bundle(bundle), network)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_are_of_a_float_type(bundle: Path, dtype: torch.dtype) -> None:
    file = shard(bundle)
    tensors = load_file(file)
    name = min(tensors)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    with pytest.raises(BadWeights, match=f"that are no weights\n  got: {name} of"):
        check_tensors(open_bundle(bundle), "vae")


def shard(bundle: Path) -> Path:
    return bundle / open_bundle(bundle).networks.vae.files[0]


def test_a_file_swapped_after_the_check_is_not_used(bundle: Path) -> None:
    file, opened = shard(bundle), open_bundle(bundle)
    verify(opened)
    before = load_file(file)
    other = {name: torch.zeros_like(x) for name, x in before.items()}
    save_file(other, bundle / "other")
    os.replace(bundle / "other", file)
    for name, x in load_tensors(opened, "vae").items():
        assert torch.equal(x, before[name])
    with pytest.raises(BadWeights, match=r"altered or damaged|wrong size"):
        load_tensors(open_bundle(bundle), "vae")


def test_a_file_that_nobody_verified_is_hashed_as_it_is_loaded(bundle: Path) -> None:
    file = shard(bundle)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    check_tensors(open_bundle(bundle), "vae")  # the header is as it was
    with pytest.raises(BadWeights, match="was altered or damaged"):
        load_tensors(open_bundle(bundle), "vae")


def test_a_file_overwritten_in_place_is_noticed_at_the_next_load(bundle: Path) -> None:
    file, opened = shard(bundle), open_bundle(bundle)
    verify(opened)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as place:
        place.write(content)
    os.utime(file, ns=(0, 0))
    with pytest.raises(BadWeights, match="written to while it was in use"):
        load_tensors(opened, "vae")


def test_a_file_is_hashed_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        content = pread(descriptor, size, offset)
        read.append(len(content))
        return content

    monkeypatch.setattr("pw_runtime.system.tensor_file.os.pread", counted)
    opened = open_bundle(bundle)
    verify(opened)
    for network in get_args(Network):
        load_tensors(opened, network)
    shards = [file for network in get_args(Network) for file in _files(opened, network)]
    assert sum(read) == sum(opened.files[name].bytes for name in shards)
    assert sha256_of(bundle / shards[0]) == opened.files[shards[0]].sha256


def _files(bundle: Any, network: Network) -> tuple[str, ...]:
    entry = bundle.networks.get(network)
    assert entry is not None
    return tuple(entry.files)
