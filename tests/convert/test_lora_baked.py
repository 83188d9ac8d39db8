# SPDX-License-Identifier: Apache-2.0
"""`pw convert --lora`: a bundle whose weights are those that a merge at load makes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pw_runtime.checkpoint.bundle import Bundle, load_tensors, open_bundle, sha256_of
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.checkpoint.lora_choice import choose_loras
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.types import LinearFormat, LoraFile, Precision, StageName
from tests.convert.layouts import quietly
from tests.convert.loras import MODULES, random_pairs, tensors_in, write_lora
from tests.oracle.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lora(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraFile:
    tensors = tensors_in("ComfyUI", random_pairs(open_bundle(bundle_dir)))
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return LoraFile(write_lora(path, tensors), 0.7)


@pytest.fixture(scope="module")
def baked(
    checkpoint: Checkpoint, lora: LoraFile, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("baked") / "bundle"
    return quietly(out, wan=checkpoint.base, highres=checkpoint.highres, loras=[lora])


def loaded(
    bundle: Bundle, stage: StageName, precision: Precision, linear: LinearFormat
) -> dict[str, torch.Tensor]:
    return load_dit(bundle, stage, precision, CPU, linear=linear).state_dict()


@pytest.mark.parametrize("linear", ["exact", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["draft", "highres"])
def test_a_baked_bundle_has_the_bits_of_a_merge_at_load(
    stage: StageName,
    precision: Precision,
    linear: LinearFormat,
    baked: Bundle,
    bundle_dir: Path,
    lora: LoraFile,
) -> None:
    merged = loaded(choose_loras(open_bundle(bundle_dir), [lora], None), stage, precision, linear)
    got = loaded(baked, stage, precision, linear)
    assert got.keys() == merged.keys()
    for name, x in merged.items():
        assert got[name].dtype == x.dtype, name
        assert torch.equal(got[name].view(torch.uint8), x.view(torch.uint8)), name


def test_what_no_lora_touches_keeps_its_dtype_and_bits(baked: Bundle, bundle_dir: Path) -> None:
    before = load_tensors(open_bundle(bundle_dir), "highres")
    after = load_tensors(baked, "highres")
    touched = {f"{module}.weight" for module in MODULES}
    for name, x in before.items():
        if name in touched:
            assert after[name].dtype == torch.float32
            assert not torch.equal(after[name], x.float())
        else:
            assert after[name].dtype == x.dtype
            assert torch.equal(after[name], x)


def test_the_bundle_says_what_is_baked_in(baked: Bundle, lora: LoraFile) -> None:
    text = f"style.safetensors:0.7 (SHA-256 {sha256_of(lora.path)})"
    source = open_bundle(baked.root).manifest.source
    assert source["loras.draft"] == source["loras.highres"] == text


def test_the_high_res_network_can_have_its_own_or_none(
    checkpoint: Checkpoint, lora: LoraFile, bundle_dir: Path, tmp_path: Path
) -> None:
    bundle = quietly(
        tmp_path / "b",
        wan=checkpoint.base,
        highres=checkpoint.highres,
        loras=[lora],
        loras_highres=[],
    )
    plain = loaded(open_bundle(bundle_dir), "highres", "fp32", "exact")
    got = loaded(bundle, "highres", "fp32", "exact")
    assert all(torch.equal(got[name], x) for name, x in plain.items())
    assert "loras.highres" not in bundle.manifest.source
    assert "loras.draft" in bundle.manifest.source


def test_a_lora_for_a_network_that_is_not_converted_is_refused(
    checkpoint: Checkpoint, lora: LoraFile, tmp_path: Path
) -> None:
    with pytest.raises(
        BadRequest, match="a LoRA is named for the highres network, and the model has none"
    ):
        quietly(tmp_path / "b", wan=checkpoint.base, loras_highres=[lora])
    assert not (tmp_path / "b").exists()


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bad = write_lora(tmp_path / "bad.safetensors", {"unknown.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(BadWeights, match="1 key unknown"):
        quietly(tmp_path / "b", wan=checkpoint.base, loras=[LoraFile(bad)])
    assert not (tmp_path / "b").exists()
