# SPDX-License-Identifier: Apache-2.0
"""LoRA files that do not fit: one error lists everything in them that is not used, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.lora import with_loras
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.types import LoraFile
from tests.convert.loras import Tensors, random_pairs, tensors_in, with_lora, write_lora

Q = "diffusion_model.blocks.0.self_attn.q"
K = "diffusion_model.blocks.0.self_attn.k"


def valid(bundle_dir: Path) -> Tensors:
    return tensors_in("ComfyUI", random_pairs(open_bundle(bundle_dir)))


def refusal(bundle_dir: Path, path: Path, network: str = "draft") -> str:
    with pytest.raises(BadWeights) as caught:
        with_lora(bundle_dir, path, network=network)  # type: ignore[arg-type]
    return str(caught.value)


def pair(module: str, rows: int, columns: int, rank: int = 4) -> Tensors:
    return {
        f"{module}.lora_A.weight": torch.zeros(rank, columns),
        f"{module}.lora_B.weight": torch.zeros(rows, rank),
    }


# What is added to a valid file, and the words that name it.
ADDED: dict[str, tuple[Tensors, str]] = {
    "DoRA": ({f"{Q}.dora_scale": torch.ones(96, 1)}, "1 key of DoRA, which rescales weights"),
    "DoRA of PEFT": (
        {"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(96)},
        "1 key of DoRA",
    ),
    "LoHa": ({f"{K}.hada_w1_a": torch.ones(96, 4)}, "1 key of LoHa"),
    "LoKr": (
        {f"{K}.lokr_w1": torch.ones(4, 4), f"{K}.lokr_w2": torch.ones(4, 4)},
        "2 keys of LoKr",
    ),
    "lora_mid": ({f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "with a middle matrix"),
    "bias of PEFT": ({f"{Q}.lora_B.bias": torch.ones(96)}, "of biases beside the matrices"),
    "text encoder": (
        {"text_encoder.block.0.q.lora_A.weight": torch.ones(2, 2)},
        "1 key of the text encoder, which takes no LoRA here",
    ),
    "text encoder of kohya": ({"lora_te1_layers_0.alpha": torch.ones(1)}, "of the text encoder"),
    "Wan2.1 I2V": (
        pair("diffusion_model.blocks.0.cross_attn.k_img", 96, 96),
        "2 keys of the image encoder that only image-to-video models of Wan2.1 have",
    ),
    "Wan2.1 I2V of diffusers": (
        pair("transformer.blocks.0.attn2.add_v_proj", 96, 96),
        "2 keys of the image encoder",
    ),
    "more blocks": (
        pair("diffusion_model.blocks.39.ffn.0", 208, 96),
        "2 keys of other blocks than the 3 that the network has",
    ),
    "the high-res additions": (
        pair("diffusion_model.dt_embedding.0", 96, 256),
        "2 keys of what only the high-res network has",
    ),
    "unknown": ({"diffusion_model.blocks.0.self_attn.z.diff": torch.ones(2)}, "1 key unknown"),
    "unknown part": ({f"{K}.set_weight": torch.ones(96, 96)}, "1 key unknown"),
    "weights": (
        {"blocks.0.self_attn.q.weight": torch.ones(96, 96)},
        "1 key with a network's own weights",
    ),
    "A alone": (
        {f"{K}.lora_A.weight": torch.ones(4, 96)},
        "1 key without the matrix up that belongs to it",
    ),
    "B alone": (
        {f"{K}.lora_B.weight": torch.ones(96, 4)},
        "1 key without the matrix down that belongs to it",
    ),
    "alpha alone": ({f"{K}.alpha": torch.ones(1)}, "without the matrix up and down"),
    "twice": (
        {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.ones(2, 96)},
        f"1 key for blocks.0.self_attn.q.weight, which {Q}.lora_A.weight is for too",
    ),
    "matrices and a difference": (
        {f"{Q}.diff": torch.ones(96, 96)},
        "1 key with a difference where there are matrices too",
    ),
    "other shape": (
        pair(K, 96, 95),
        "1 key of the shapes [96, 4] and [4, 95], for a weight [96, 96]",
    ),
    "difference of another shape": (
        {f"{K}.diff": torch.ones(96, 95)},
        "1 key of the shape [96, 95], wanted [96, 96]",
    ),
    "matrices of a norm": (
        pair("diffusion_model.blocks.0.norm3", 96, 1),
        "for a weight [96]",
    ),
    "two ranks": (
        {f"{K}.lora_A.weight": torch.ones(4, 96), f"{K}.lora_B.weight": torch.ones(96, 8)},
        "1 key of the ranks 8 and 4",
    ),
    "rank beyond both sides": (pair(K, 96, 96, rank=97), "1 key of the ranks 97 and 97"),
    "NaN": (pair(K, 96, 96) | {f"{K}.lora_A.weight": torch.full((4, 96), torch.nan)}, "NaN"),
    "infinity": ({f"{K}.diff_b": torch.full((96,), torch.inf)}, "1 key with NaN or infinity"),
    "alpha of NaN": (
        pair(K, 96, 96) | {f"{K}.alpha": torch.tensor(torch.nan)},
        "1 key with an alpha that is no finite number",
    ),
    "alphas": (
        pair(K, 96, 96) | {f"{K}.alpha": torch.ones(2)},
        "with an alpha that is no finite number",
    ),
    "integers": (
        {name: x.to(torch.int8) for name, x in pair(K, 96, 96).items()},
        "2 keys of dtype I8, which is not read",
    ),
}


@pytest.mark.parametrize("kind", ADDED)
def test_a_key_that_cannot_be_used_is_named_with_its_reason(
    kind: str, bundle_dir: Path, tmp_path: Path
) -> None:
    added, words = ADDED[kind]
    path = write_lora(tmp_path / "bad.safetensors", valid(bundle_dir) | added)
    said = refusal(bundle_dir, path)
    assert words in said
    assert next(iter(added)) in said or "lora_B" in said
    assert f"{path} cannot be merged into the draft network" in said


def test_numbers_that_are_none_are_told_from_keys_that_do_not_fit(
    bundle_dir: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "bad.safetensors", valid(bundle_dir) | ADDED["NaN"][0])
    said = refusal(bundle_dir, path)
    assert "its training has diverged, or it is damaged" in said
    assert "that was trained on this model" not in said


def test_everything_that_does_not_fit_is_in_one_error(bundle_dir: Path, tmp_path: Path) -> None:
    kinds = ("DoRA", "LoKr", "Wan2.1 I2V", "A alone", "unknown")
    added = {name: x for kind in kinds for name, x in ADDED[kind][0].items()}
    path = write_lora(tmp_path / "bad.safetensors", valid(bundle_dir) | added)
    said = refusal(bundle_dir, path)
    assert all(ADDED[kind][1] in said for kind in kinds)


@pytest.mark.parametrize(
    ("width", "name"), [(5120, "a Wan model of 14B"), (1536, "Wan2.1 of 1.3B")]
)
def test_a_lora_of_another_model_is_told_so(
    width: int, name: str, bundle_dir: Path, tmp_path: Path
) -> None:
    tensors = pair(Q, width, width) | pair("diffusion_model.blocks.39.ffn.0", width, width)
    said = refusal(bundle_dir, write_lora(tmp_path / "other.safetensors", tensors))
    assert f"is a LoRA for {name} ({width} wide), not for the draft network" in said
    assert "a LoRA for a network 96 wide" in said
    assert "blocks.39" in said


def test_a_file_that_changes_nothing_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    said = refusal(bundle_dir, write_lora(tmp_path / "empty.safetensors", {}))
    assert "a file without any change of a weight" in said


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"transformer.use_dora": True}, "DoRA"),
        ({"transformer.lora_alpha": "8"}, "alpha that is no number"),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"(": 8}}, "broken pattern"),
        (
            {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"([a-z]+|.)+": 8}},
            "'([a-z]+|.)+', which may take for ever",
        ),
        (
            {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {".*.*.*.*q": 8}},
            "at most 3 of *, + and ?",
        ),
        (
            {"transformer.lora_alpha": 8, "transformer.init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4'",
        ),
    ],
)
def test_metadata_that_cannot_be_followed_are_refused(
    metadata: dict[str, object], words: str, bundle_dir: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "bad.safetensors", valid(bundle_dir), metadata)
    assert words in refusal(bundle_dir, path)


def _pickle(path: Path) -> None:
    torch.save({"a": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_pickle, "is a PyTorch pickle, which may run code"),
        (lambda path: path.write_text("<html>"), "no complete safetensors file"),
        (lambda path: path.mkdir(), "a folder, not a file"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_lora_file_is_told_so(
    write: Callable[[Path], object], words: str, bundle_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    write(path)
    said = refusal(bundle_dir, path)
    assert words in said
    assert str(path) in said


def test_a_file_that_was_cut_off_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "cut.safetensors", valid(bundle_dir))
    path.write_bytes(path.read_bytes()[:-5])
    assert "no complete safetensors file" in refusal(bundle_dir, path)


def test_a_lora_for_a_network_that_the_bundle_lacks_is_refused(
    bundle_dir: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    path, bundle = (
        write_lora(tmp_path / "l.safetensors", valid(bundle_dir)),
        open_bundle(bundle_dir),
    )
    networks = replace(bundle.networks, highres=None)
    alone = replace(bundle, manifest=replace(bundle.manifest, networks=networks))
    with pytest.raises(BadRequest, match="named for the highres network, and the model has none"):
        with_loras(alone, {"highres": [LoraFile(path)]})


def test_a_rank_beyond_one_side_of_a_matrix_is_legal(bundle_dir: Path, tmp_path: Path) -> None:
    """Trainers have one rank for all weights, and some of these are small on one side."""
    tensors: dict[str, Tensor] = pair("diffusion_model.text_embedding.0", 96, 40, rank=64)
    path = write_lora(tmp_path / "wide.safetensors", tensors)
    assert with_lora(bundle_dir, path).loras["draft"][0].changes.keys() == {
        "text_embedding.0.weight"
    }
