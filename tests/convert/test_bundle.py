# SPDX-License-Identifier: Apache-2.0
"""A bundle is read strictly: any damage gives an error that names the file and the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pw_runtime.checkpoint.bundle import load_tensors, open_bundle, sha256_of, verify
from pw_runtime.errors import BadWeights
from tests.convert.layouts import State, edit_json, edit_shard
from tests.oracle.checkpoint import Checkpoint

DRAFT = "draft/model-00001-of-00001.safetensors"


@pytest.fixture
def broken(bundle_dir: Path, tmp_path: Path) -> Path:
    """Copy a bundle, to damage it."""
    return shutil.copytree(bundle_dir, tmp_path / "bundle")


def test_decoder_is_loaded_without_the_encoder(bundle_dir: Path) -> None:
    bundle = open_bundle(bundle_dir)
    everything = load_tensors(bundle, "vae")
    decoder = load_tensors(bundle, "vae", prefix=("decoder.", "conv2."))
    assert decoder.keys() == {n for n in everything if n.startswith(("decoder.", "conv2."))}
    assert 0 < len(decoder) < len(everything)
    assert all(torch.equal(decoder[name], everything[name]) for name in decoder)


def test_tensors_stay_mapped_until_they_are_used(tmp_path: Path, bundle_dir: Path) -> None:
    """Loading must not cost memory for weights that go straight to a GPU."""
    tensors = load_tensors(open_bundle(bundle_dir), "draft")
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("needs /proc")
    assert str(bundle_dir / DRAFT) in mapped.read_text()
    assert tensors


def test_bundle_without_highres_says_how_to_get_one(broken: Path) -> None:
    content = json.loads((broken / "bundle.json").read_text())
    content["networks"]["highres"] = None
    (broken / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BadWeights, match=r"no highres network[\s\S]*--highres"):
        load_tensors(open_bundle(broken), "highres")


def test_missing_bundle_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match=r"no bundle at .*nowhere[\s\S]*pw convert --wan"):
        open_bundle(tmp_path / "nowhere")


def test_published_checkpoint_is_recognised(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadWeights, match=r"published checkpoint, not a bundle[\s\S]*pw convert"):
        open_bundle(checkpoint.base)


def test_no_advice_names_a_folder_that_exists_as_the_new_one(tmp_path: Path) -> None:
    """`pw convert` refuses it, and says that it may be removed."""
    with pytest.raises(BadWeights) as caught:
        open_bundle(tmp_path)
    assert "--out BUNDLE" in str(caught.value)
    (tmp_path / "split_files").mkdir()
    with pytest.raises(BadWeights, match="published checkpoint, not a bundle"):
        open_bundle(tmp_path)


def test_checkpoint_file_is_no_bundle(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadWeights, match=r"no bundle at .*highres\.pt[\s\S]*pw convert"):
        open_bundle(checkpoint.highres)


@pytest.mark.parametrize(
    ("place", "value", "part"),
    [
        ((), {"extra": 1}, "extra"),
        ((), {"format": 2}, "format"),
        (("networks",), {"extra": 1}, "networks.extra"),
        (("networks", "draft"), {"extra": 1}, "networks.draft.extra"),
        (("networks", "draft", "config"), {"heads": 1}, "networks.draft.config.heads"),
        (("networks", "draft", "config"), {"dim": "96"}, "networks.draft.config.dim"),
        (("networks", "vae", "config"), {"latent_mean": None}, "networks.vae.config.latent_mean"),
        (("files", DRAFT), {"bytes": "1"}, "bytes"),
    ],
)
def test_manifest_fields_are_exactly_the_known_ones(
    place: tuple[str, ...], value: dict[str, Any], part: str, broken: Path
) -> None:
    content = json.loads((broken / "bundle.json").read_text())
    inner = content
    for name in place:
        inner = inner[name]
    inner |= value
    (broken / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BadWeights, match=r"bundle\.json cannot be used[\s\S]*pw convert") as caught:
        open_bundle(broken)
    assert part in str(caught.value)


def test_manifest_that_is_no_json_is_named(broken: Path) -> None:
    os.truncate(broken / "bundle.json", 100)
    with pytest.raises(BadWeights, match=r"bundle\.json cannot be used[\s\S]*do this"):
        open_bundle(broken)


@pytest.mark.parametrize("name", ["../outside", "/outside", "vae/../../outside"])
def test_files_outside_the_bundle_are_refused(name: str, broken: Path) -> None:
    record = {"bytes": 0, "sha256": ""}
    content = json.loads((broken / "bundle.json").read_text())
    edit_json(broken / "bundle.json", files={**content["files"], name: record})
    with pytest.raises(BadWeights, match="cannot be part of the bundle") as caught:
        open_bundle(broken)
    assert name in str(caught.value)


def test_shard_without_a_digest_is_refused(broken: Path) -> None:
    content = json.loads((broken / "bundle.json").read_text())
    del content["files"][DRAFT]
    edit_json(broken / "bundle.json", files=content["files"])
    with pytest.raises(BadWeights, match="cannot be part of the bundle") as caught:
        open_bundle(broken)
    assert DRAFT in str(caught.value)


def test_one_changed_bit_is_found_with_both_digests(broken: Path) -> None:
    bundle = open_bundle(broken)
    expected = bundle.files[DRAFT].sha256
    content = bytearray((broken / DRAFT).read_bytes())
    content[-1] ^= 1
    (broken / DRAFT).write_bytes(content)
    with pytest.raises(BadWeights, match=r"was altered or damaged[\s\S]*do this") as caught:
        verify(bundle)
    for part in (DRAFT, sha256_of(broken / DRAFT), expected):
        assert part in str(caught.value)


def test_truncated_file_is_found_by_its_size(broken: Path) -> None:
    bundle = open_bundle(broken)
    size = (broken / DRAFT).stat().st_size
    os.truncate(broken / DRAFT, size - 1)
    with pytest.raises(BadWeights, match=r"has the wrong size[\s\S]*do this") as caught:
        verify(bundle)
    for part in (DRAFT, f"{size - 1} bytes", f"{size} bytes", bundle.files[DRAFT].sha256):
        assert part in str(caught.value)


def test_missing_file_is_found(broken: Path) -> None:
    bundle = open_bundle(broken)
    (broken / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(BadWeights, match=r"tokenizer\.json is missing[\s\S]*do this"):
        verify(bundle)


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 1000), Path.unlink])
def test_damaged_shard_is_named_when_tensors_are_loaded(
    damage: Callable[[Path], None], broken: Path
) -> None:
    damage(broken / DRAFT)
    with pytest.raises(BadWeights, match=r"draft/model.*cannot be read[\s\S]*do this"):
        load_tensors(open_bundle(broken), "draft")


def test_missing_extra_and_misshapen_tensors_are_named(broken: Path) -> None:
    name = "blocks.0.norm3.weight"
    pristine = load_file(broken / DRAFT)
    changes: list[tuple[str, Callable[[State], object]]] = [
        (f"lacks tensors\n  got: without {name}", lambda tensors: tensors.pop(name)),
        ("unknown tensors\n  got: stray", lambda tensors: tensors.update(stray=torch.zeros(1))),
        (f"{name} [7]\n  wanted: {name} [96]", lambda t: t.update({name: torch.zeros(7)})),
    ]
    for part, change in changes:
        save_file(pristine, broken / DRAFT)
        edit_shard(broken / DRAFT, change)
        with pytest.raises(BadWeights, match="the draft network of") as caught:
            load_tensors(open_bundle(broken), "draft")
        assert part in str(caught.value)


def test_tensor_in_two_shards_is_named(broken: Path) -> None:
    second = "draft/model-00002-of-00002.safetensors"
    name = "head.head.bias"
    save_file({name: load_file(broken / DRAFT)[name]}, broken / second)
    content = json.loads((broken / "bundle.json").read_text())
    content["networks"]["draft"]["files"].append(second)
    content["files"][second] = content["files"][DRAFT]
    (broken / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BadWeights, match=r"model-00002.*repeats tensors[\s\S]*head\.head\.bias"):
        load_tensors(open_bundle(broken), "draft")
