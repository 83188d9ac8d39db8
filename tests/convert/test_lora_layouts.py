# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every writer: the same matrices give the same weights, whatever they are called."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pw_runtime.checkpoint.bundle import load_tensors, open_bundle
from pw_runtime.checkpoint.keymaps import dit_to_diffusers
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.checkpoint.lora_keys import Target, target_of
from pw_runtime.errors import BadWeights
from pw_runtime.models import expected_shapes
from pw_runtime.types import LoraFile, StageName
from tests.closeness import max_abs
from tests.convert.loras import (
    LAYOUTS,
    MODULES,
    Pair,
    random_pairs,
    tensors_in,
    with_lora,
    write_lora,
)
from tests.networks import TINY_HIGHRES

CPU = torch.device("cpu")


def loaded(bundle: Any, network: StageName = "draft") -> dict[str, Tensor]:
    return load_dit(bundle, network, "fp32", CPU).state_dict()


def expected(bundle_dir: Path, pairs: dict[str, Pair], scale: float = 1.0) -> dict[str, Tensor]:
    """The network with the products of matrices added in the plainest way."""
    weights = {
        name: x.float() for name, x in load_tensors(open_bundle(bundle_dir), "draft").items()
    }
    for module, pair in pairs.items():
        factor = pair.alpha / len(pair.down) * scale
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + pair.up @ pair.down * factor
    return weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(layout: str, bundle_dir: Path, tmp_path: Path) -> None:
    pairs = random_pairs(open_bundle(bundle_dir))
    file = write_lora(tmp_path / "lora.safetensors", tensors_in(layout, pairs))
    got = loaded(with_lora(bundle_dir, LoraFile(file, 0.7)))
    for name, x in expected(bundle_dir, pairs, 0.7).items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_matrices_are_widened_before_they_are_multiplied(
    dtype: torch.dtype, bundle_dir: Path, tmp_path: Path
) -> None:
    pairs = {
        name: replace(pair, down=pair.down.to(dtype), up=pair.up.to(dtype))
        for name, pair in random_pairs(open_bundle(bundle_dir)).items()
    }
    file = write_lora(tmp_path / "lora.safetensors", tensors_in("ComfyUI", pairs))
    got = loaded(with_lora(bundle_dir, file))
    wide = {n: replace(p, down=p.down.float(), up=p.up.float()) for n, p in pairs.items()}
    for name, x in expected(bundle_dir, wide).items():
        assert torch.equal(got[name], x), name


def test_every_alpha_is_divided_by_the_rank_of_its_own_matrices(
    bundle_dir: Path, tmp_path: Path
) -> None:
    """Others divide all by the rank of the first (diffusers#14409)."""
    pairs = random_pairs(open_bundle(bundle_dir))
    assert len({len(pair.down) for pair in pairs.values()}) == 3
    file = write_lora(tmp_path / "lora.safetensors", tensors_in("kohya", pairs))
    lora = with_lora(bundle_dir, file).loras["draft"][0]
    for module, pair in pairs.items():
        change = lora.changes[f"{module}.weight"]
        assert change.factor == pair.alpha / len(pair.down)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor([3.0]), torch.tensor(3, dtype=torch.int64), torch.tensor(3.0).bfloat16()],
)
def test_alpha_is_a_number_of_any_dtype(alpha: Tensor, bundle_dir: Path, tmp_path: Path) -> None:
    tensors = tensors_in("kijai", random_pairs(open_bundle(bundle_dir)))
    name = "diffusion_model.blocks.0.self_attn.q.alpha"
    file = write_lora(tmp_path / "lora.safetensors", tensors | {name: alpha})
    lora = with_lora(bundle_dir, file).loras["draft"][0]
    assert lora.changes["blocks.0.self_attn.q.weight"].factor == 1.5  # type: ignore[union-attr]


def without_alpha(layout: str, pairs: dict[str, Pair]) -> dict[str, Tensor]:
    return {n: x for n, x in tensors_in(layout, pairs).items() if not n.endswith(".alpha")}


def test_without_alpha_products_are_added_as_they_are(bundle_dir: Path, tmp_path: Path) -> None:
    pairs = random_pairs(open_bundle(bundle_dir))
    file = write_lora(tmp_path / "lora.safetensors", without_alpha("ComfyUI", pairs))
    lora = with_lora(bundle_dir, file).loras["draft"][0]
    assert {x.factor for x in lora.changes.values()} == {1.0}  # type: ignore[union-attr]


def test_alpha_can_be_in_the_metadata_as_diffusers_writes_it(
    bundle_dir: Path, tmp_path: Path
) -> None:
    tensors = without_alpha("diffusers", random_pairs(open_bundle(bundle_dir)))
    metadata: dict[str, object] = {
        "transformer.r": 8,
        "transformer.lora_alpha": 12,
        "transformer.alpha_pattern": {"attn2.to_k": 5},
    }
    file = write_lora(tmp_path / "lora.safetensors", tensors, metadata)
    changes: Any = with_lora(bundle_dir, file).loras["draft"][0].changes
    assert changes["blocks.1.cross_attn.k.weight"].factor == 5 / 6
    others = [x for name, x in changes.items() if "cross_attn.k" not in name]
    assert all(x.factor == 12 / x.rank for x in others)
    stable = metadata | {"transformer.use_rslora": True}
    file = write_lora(tmp_path / "stable.safetensors", tensors, stable)
    changes = with_lora(bundle_dir, file).loras["draft"][0].changes
    assert changes["blocks.0.self_attn.q.weight"].factor == 12 / math.sqrt(2)


def test_alpha_can_be_in_the_config_that_peft_writes_beside_its_file(
    bundle_dir: Path, tmp_path: Path
) -> None:
    tensors = without_alpha("PEFT", random_pairs(open_bundle(bundle_dir)))
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    write_lora(file, tensors)
    alone = with_lora(bundle_dir, file).loras["draft"][0]
    config.write_text(json.dumps({"r": 8, "lora_alpha": 12, "alpha_pattern": {"attn2.to_k": 5}}))
    beside = with_lora(bundle_dir, file).loras["draft"][0]
    changes: Any = beside.changes
    assert changes["blocks.1.cross_attn.k.weight"].factor == 5 / 6
    assert changes["blocks.0.self_attn.q.weight"].factor == 12 / 2
    assert beside.source.sha256 != alone.source.sha256
    config.write_text(json.dumps({"lora_alpha": 12, "use_dora": True}))
    with pytest.raises(BadWeights, match=r"DoRA, by adapter_config\.json"):
        with_lora(bundle_dir, file)
    config.write_text("{")
    with pytest.raises(BadWeights, match=r"adapter_config\.json is not JSON"):
        with_lora(bundle_dir, file)
    other = write_lora(
        tmp_path / "comfy.safetensors",
        without_alpha("ComfyUI", random_pairs(open_bundle(bundle_dir))),
    )
    assert with_lora(bundle_dir, other).loras["draft"][0].changes  # that is not about this one


def test_differences_of_any_tensor_are_added(bundle_dir: Path, tmp_path: Path) -> None:
    """Norms, modulation, convolution and biases too, which other programs drop."""
    before = {name: x.float() for name, x in load_tensors(open_bundle(bundle_dir), "draft").items()}
    keys = {
        "blocks.1.self_attn.norm_q.weight": "diffusion_model.blocks.1.self_attn.norm_q.diff",
        "blocks.1.norm3.weight": "diffusion_model.blocks.1.norm3.diff",
        "blocks.1.norm3.bias": "diffusion_model.blocks.1.norm3.diff_b",
        "blocks.2.ffn.0.bias": "diffusion_model.blocks.2.ffn.0.diff_b",
        "blocks.2.ffn.0.weight": "diffusion_model.blocks.2.ffn.0.diff",
        "blocks.0.modulation": "diffusion_model.blocks.0.modulation.diff",
        "head.modulation": "diffusion_model.head.modulation.diff",
        "head.head.weight": "diffusion_model.head.head.diff",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
        "time_projection.1.bias": "diffusion_model.time_projection.1.diff_b",
    }
    differences = {name: torch.randn(before[name].shape) for name in keys}
    file = write_lora(tmp_path / "l.safetensors", {keys[n]: x for n, x in differences.items()})
    got = loaded(with_lora(bundle_dir, LoraFile(file, 0.5)))
    for name, x in before.items():
        wanted = x + 0.5 * differences[name] if name in differences else x
        assert torch.equal(got[name], wanted), name


def test_a_convolution_has_matrices_with_the_kernel_in_the_first(
    bundle_dir: Path, tmp_path: Path
) -> None:
    down, up = torch.randn(4, 48, 1, 2, 2), torch.randn(96, 4, 1, 1, 1)
    name = "diffusion_model.patch_embedding"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    file = write_lora(tmp_path / "lora.safetensors", tensors)
    before = load_dit(open_bundle(bundle_dir), "draft", "fp32", CPU).patch_embedding
    after = load_dit(with_lora(bundle_dir, file), "draft", "fp32", CPU).patch_embedding
    with torch.no_grad():
        video = torch.randn(1, 48, 2, 4, 6)
        hidden = torch.nn.functional.conv3d(video, down, stride=(1, 2, 2))
        wanted = before(video) + torch.nn.functional.conv3d(hidden, up)
        assert torch.allclose(after(video), wanted, atol=1e-4)


def test_the_high_res_additions_take_a_lora_in_the_high_res_network(
    bundle_dir: Path, tmp_path: Path
) -> None:
    names = ("dt_embedding.0", "spatial_adapter.zero_layers.1", "spatial_adapter.adapter_dt_proj.2")
    shapes = {name: x.shape for name, x in loaded(open_bundle(bundle_dir), "highres").items()}
    tensors = {}
    for name in names:
        rows, columns = shapes[f"{name}.weight"]
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, 2)
    file = write_lora(tmp_path / "lora.safetensors", tensors)
    before, after = (
        loaded(bundle, "highres")
        for bundle in (open_bundle(bundle_dir), with_lora(bundle_dir, file, network="highres"))
    )
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed == {f"{name}.weight" for name in names}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
def test_every_tensor_of_the_network_can_be_named(prefix: str) -> None:
    """By its official name and by that of diffusers, in the high-res network too."""
    for tensor in expected_shapes("highres", TINY_HIGHRES):
        leaf = ".bias" if tensor.endswith(".bias") else ".weight"
        module, key = tensor.removesuffix(leaf), ".diff_b" if leaf == ".bias" else ".diff"
        for name in filter(None, (module, dit_to_diffusers(module))):
            assert target_of(f"{prefix}{name}{key}", TINY_HIGHRES) == Target(tensor, "difference")
            flat = f"lora_unet_{name.replace('.', '_')}{key}"
            assert target_of(flat, TINY_HIGHRES) == Target(tensor, "difference")


@pytest.mark.parametrize("module", ["blocks.0", "head"])
def test_the_modulation_of_lightx2v_is_that_of_the_module(module: str) -> None:
    found = target_of(f"diffusion_model.{module}.diff_m", TINY_HIGHRES)
    assert found == Target(f"{module}.modulation", "difference")


def test_a_lora_may_be_named_by_a_text(bundle_dir: Path, tmp_path: Path) -> None:
    pairs = random_pairs(open_bundle(bundle_dir))
    file = write_lora(tmp_path / "lora.safetensors", tensors_in("ComfyUI", pairs))
    named = [LoraFile(str(file), 0.7), LoraFile(file, 0.7)]  # type: ignore[arg-type]
    assert named[0] == named[1]
    got, expected = (loaded(with_lora(bundle_dir, lora)) for lora in named)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


@pytest.mark.parametrize("layout", ["ComfyUI", "kijai"])
def test_diffusers_reads_the_same_products(layout: str, bundle_dir: Path) -> None:
    """Its reader is a second implementation, of the blocks alone and with rounding of its own."""
    from diffusers.loaders import WanLoraLoaderMixin

    bundle = open_bundle(bundle_dir)
    blocks = tuple(module for module in MODULES if module.startswith("blocks."))
    pairs = random_pairs(bundle, modules=blocks)
    # Copies, because it scales some of the matrices that it is given in place.
    given = {name: x.clone() for name, x in tensors_in(layout, pairs).items()}
    theirs = WanLoraLoaderMixin.lora_state_dict(given)
    for module, pair in pairs.items():
        name = f"transformer.{dit_to_diffusers(module)}"
        product = theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
        assert max_abs(product, pair.delta) < 1e-6 * pair.delta.abs().max() * len(pair.down)
