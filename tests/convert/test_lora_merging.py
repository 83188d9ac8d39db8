# SPDX-License-Identifier: Apache-2.0
"""LoRAs merged into the weights of a network: wherever these are, and before they are rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pw_bench.measure.tensor_ledger import Ledger
from pw_runtime.checkpoint import lora as lora_module
from pw_runtime.checkpoint.bundle import Bundle, load_tensors, open_bundle
from pw_runtime.checkpoint.loader import is_streamed, load_dit
from pw_runtime.checkpoint.lora import lora_texts
from pw_runtime.checkpoint.lora_checks import LowRank
from pw_runtime.errors import BadWeights
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.execution.weight_streaming import ResidentWeights, StreamedWeights, Weights
from pw_runtime.models.quantized_linear import quantized_weights
from pw_runtime.types import LinearFormat, LoraFile, Precision, Residency
from tests.convert.loras import random_pairs, tensors_in, with_lora, write_lora

CPU = torch.device("cpu")


@pytest.fixture
def lora(bundle_dir: Path, tmp_path: Path) -> Path:
    tensors = tensors_in("ComfyUI", random_pairs(open_bundle(bundle_dir)))
    return write_lora(tmp_path / "lora.safetensors", tensors)


def state(bundle: Bundle, **how: Any) -> dict[str, torch.Tensor]:
    return load_dit(bundle, "draft", how.pop("precision", "fp32"), CPU, **how).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scale_of_0_is_no_lora(bundle_dir: Path, lora: Path, precision: Precision) -> None:
    """Bit for bit: not even the sign of a zero changes."""
    nothing = with_lora(bundle_dir, LoraFile(lora, 0.0))
    assert same(
        state(nothing, precision=precision), state(open_bundle(bundle_dir), precision=precision)
    )


def test_loras_add_up_in_their_order(bundle_dir: Path, lora: Path, tmp_path: Path) -> None:
    bundle = open_bundle(bundle_dir)
    other = write_lora(
        tmp_path / "other.safetensors", tensors_in("kohya", random_pairs(bundle, seed=1))
    )
    both = state(with_lora(bundle, LoraFile(lora, 0.5), LoraFile(other, -0.25)))
    before, first = state(bundle), with_lora(bundle, lora).loras["draft"][0]
    second = with_lora(bundle, other).loras["draft"][0]
    name = "blocks.0.ffn.0.weight"
    wanted = before[name] + first.difference(name) * 0.5 + second.difference(name) * -0.25
    assert torch.allclose(both[name], wanted, atol=1e-6)
    assert not torch.equal(both[name], before[name])


def test_weights_are_rounded_once_after_the_merge(bundle_dir: Path, lora: Path) -> None:
    bundle = with_lora(bundle_dir, lora)
    wide, rounded = state(bundle), state(bundle, precision="bf16")
    for name in ("blocks.0.self_attn.q.weight", "head.head.weight"):
        assert torch.equal(rounded[name], wide[name].bfloat16().to(rounded[name].dtype)), name
    assert rounded["blocks.0.self_attn.q.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("linear", ["int8", "fp8"])
def test_quantized_weights_are_made_of_merged_ones(
    bundle_dir: Path, lora: Path, linear: LinearFormat
) -> None:
    bundle = with_lora(bundle_dir, lora)
    merged, name = state(bundle), "blocks.1.self_attn.o.weight"
    parts = dict(quantized_weights(name, merged[name], linear))  # type: ignore[arg-type]
    got = state(bundle, linear=linear)
    for part, x in parts.items():
        assert torch.equal(got[part].float(), x.float()), part


def weights_of(bundle: Bundle, residency: Residency, precision: Precision) -> Weights:
    """The provider that `load_transformer` makes for a residency."""
    net = load_dit(bundle, "draft", precision, CPU, residency)
    segments = segments_of(net.config, precision, 64)
    if residency == "resident":
        return ResidentWeights(net, segments)
    loras = bundle.loras["draft"] if residency == "mapped" else ()
    return StreamedWeights(net, segments, precision, CPU, loras)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("residency", ["streamed", "mapped"])
def test_streamed_and_mapped_weights_are_those_that_are_resident(
    bundle_dir: Path, lora: Path, residency: Residency, precision: Precision
) -> None:
    bundle = with_lora(bundle_dir, LoraFile(lora, 0.7))
    resident, others = (weights_of(bundle, r, precision) for r in ("resident", residency))
    try:
        layers = bundle.networks.draft.config.num_layers
        for block in range(layers):
            for part in ("block_in", "block_out", "text_keys_values"):
                pairs = zip(resident.acquire(part, block), others.acquire(part, block), strict=True)
                assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs), part
                others.release(part, block, (block + 1) % layers)
        for segment in ("embed", "head", "modulation"):
            pairs = zip(resident.acquire(segment), others.acquire(segment), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), segment
    finally:
        others.close()


def test_mapped_weights_stay_in_the_files(bundle_dir: Path, lora: Path) -> None:
    """Merging them as they load would hold the network in memory after all."""
    plain = state(open_bundle(bundle_dir), weights="mapped")
    kept = state(with_lora(bundle_dir, lora), weights="mapped")
    streamed = [name for name in plain if is_streamed(name)]
    assert streamed
    assert all(torch.equal(plain[name], kept[name]) for name in streamed)
    assert not torch.equal(plain["head.head.weight"], kept["head.head.weight"])


def test_one_weight_is_merged_at_a_time(
    bundle_dir: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of the file is two matrices at once, never the file."""
    read: list[int] = []
    tensors = lora_module.TensorFile.tensors

    def counted(self: Any, prefix: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
        found = tensors(self, prefix)
        if self.size == lora.stat().st_size:
            read.append(len(found))
        return found

    bundle = with_lora(bundle_dir, lora)
    monkeypatch.setattr(lora_module.TensorFile, "tensors", counted)
    state(bundle)
    assert read == [2] * len(bundle.loras["draft"][0].changes)


def test_a_merge_takes_the_weight_and_what_is_added_to_it_in_fp32(
    bundle_dir: Path, lora: Path
) -> None:
    """The plan counts that, of the largest weight."""
    name = "time_projection.1.weight"
    bundle = with_lora(bundle_dir, lora)
    weight = load_tensors(bundle, "draft")[name].bfloat16()
    with Ledger() as ledger:
        lora_module.merged(bundle.loras["draft"], name, weight)
    change = bundle.loras["draft"][0].changes[name]
    assert isinstance(change, LowRank)
    matrices = 4 * change.rank * sum(weight.shape)
    assert 2 * 4 * weight.numel() <= ledger.peak["cpu"] <= 2 * 4 * weight.numel() + 2 * matrices


def test_a_scale_that_makes_weights_infinite_is_named(bundle_dir: Path, lora: Path) -> None:
    with pytest.raises(BadWeights, match=r"changes \S+ by NaN or infinity") as caught:
        state(with_lora(bundle_dir, LoraFile(lora, 1e39)))
    assert "scale 1e+39" in str(caught.value)


def test_a_lora_that_is_overwritten_after_it_was_read_is_refused(
    bundle_dir: Path, lora: Path
) -> None:
    bundle = with_lora(bundle_dir, lora)
    content = bytearray(lora.read_bytes())
    content[-1] ^= 1
    lora.write_bytes(content)
    with pytest.raises(BadWeights, match="written to while it was in use"):
        state(bundle)


def test_a_bundle_with_loras_says_so(bundle_dir: Path, lora: Path) -> None:
    """In words, and by a digest that goes by content and scale, not by the name of a file."""
    plain, bundle = open_bundle(bundle_dir), with_lora(bundle_dir, LoraFile(lora, 0.5))
    assert lora_texts(bundle.loras, ["draft"]) == [
        "LoRA of the draft network: lora.safetensors, scale 0.5, 9 tensors, rank 2 to 6, "
        "alpha / rank 0.5 to 3.5"
    ]
    assert bundle.digest == plain.digest == plain.weights_digest
    renamed = lora.rename(lora.with_name("again.safetensors"))
    again = with_lora(bundle_dir, LoraFile(renamed, 0.5))
    assert again.weights_digest == bundle.weights_digest
    assert with_lora(bundle_dir, LoraFile(renamed, 0.25)).weights_digest != bundle.weights_digest
