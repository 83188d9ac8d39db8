# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is damaged, incomplete or contradictory gives an error that names the cause.

After every refusal nothing stands beside or under the name of the bundle.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pw_runtime.errors import BadRequest, BadWeights
from tests.convert.layouts import (
    INDEX,
    SHARDS,
    T5,
    VAE,
    State,
    edit_json,
    edit_pickle,
    edit_shard,
    official_state,
    quietly,
    write_diffusers,
)
from tests.oracle.checkpoint import Checkpoint


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


@pytest.fixture
def wan(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """Copy an official checkpoint, to damage it."""
    return shutil.copytree(checkpoint.base, tmp_path / "wan")


@pytest.fixture
def theirs(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """Write it in the diffusers layout."""
    return write_diffusers(tmp_path / "theirs", checkpoint.base)


def expect_refusal(wan: Path, *parts: str, **sources: object) -> None:
    """Check that converting raises BadWeights with all `parts` and a remedy in its message."""
    out = wan.parent / "bundle"
    with pytest.raises(BadWeights) as caught:
        quietly(out, wan=wan, **sources)
    message = str(caught.value)
    assert [part for part in (*parts, "do this: ") if part not in message] == [], message
    assert not [path.name for path in wan.parent.iterdir() if "bundle" in path.name]


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_out_is_never_touched(kind: str, wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadRequest, match=r"out exists already[\s\S]*choose another path"):
        quietly(out, wan=wan)
    assert os.path.lexists(out)


def test_missing_checkpoint_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"no checkpoint folder .*nowhere[\s\S]*check the path"):
        quietly(tmp_path / "b", wan=tmp_path / "nowhere")


def test_bundle_given_as_checkpoint_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"already a bundle[\s\S]*use it without converting"):
        quietly(tmp_path / "b", wan=bundle_dir)


def test_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expect_refusal(tmp_path / "empty", "not a checkpoint of a known layout", "got: nothing in it")


@pytest.mark.parametrize(("name", "role"), [(VAE, "VAE"), (T5, "text encoder")])
def test_missing_file_is_named_beside_what_lies_there(name: str, role: str, wan: Path) -> None:
    (wan / name).unlink()
    there = sorted(path.name for path in wan.iterdir())
    expect_refusal(wan, f"holds no {role}", f"wanted: {name}", ", ".join(there), "check the path")


def test_missing_tokenizer_is_named(wan: Path) -> None:
    shutil.rmtree(wan / "google")
    expect_refusal(
        wan, "contains no tokenizer", f"{T5}", "tokenizer.json or spiece.model in google/umt5-xxl"
    )


# ---- shards -------------------------------------------------------------------------------------


def test_truncated_shard_is_named(wan: Path) -> None:
    cut_in_half(wan / SHARDS[1])
    expect_refusal(
        wan, f"{SHARDS[1]} cannot be read", "a complete safetensors file", "download it again"
    )


def test_missing_shard_of_the_index_is_named(wan: Path) -> None:
    (wan / SHARDS[1]).unlink()
    expect_refusal(wan, f"{SHARDS[1]} cannot be read", "o such file", "check the path")


def test_missing_index_is_named(wan: Path) -> None:
    (wan / INDEX).unlink()
    expect_refusal(wan, "no usable weights", INDEX, "download the whole folder again")


def test_damaged_index_is_named(wan: Path) -> None:
    (wan / INDEX).write_text('{"weight_map": {')
    expect_refusal(wan, f"{INDEX} cannot be used", "download it again")


def test_tensor_that_only_the_index_knows_is_named(wan: Path) -> None:
    edit_shard(wan / SHARDS[0], lambda tensors: tensors.pop("blocks.0.ffn.0.bias"))
    expect_refusal(wan, f"{INDEX} and {SHARDS[0]} disagree", "blocks.0.ffn.0.bias")


def test_tensor_that_the_index_does_not_know_is_named(wan: Path) -> None:
    edit_shard(wan / SHARDS[0], lambda tensors: tensors.update(stray=torch.zeros(1)))
    expect_refusal(wan, f"{INDEX} and {SHARDS[0]} disagree", "stray")


def test_tensor_in_two_shards_is_named(wan: Path) -> None:
    double = load_file(wan / SHARDS[0])["blocks.0.ffn.0.bias"]
    edit_shard(wan / SHARDS[1], lambda tensors: tensors.update({"blocks.0.ffn.0.bias": double}))
    expect_refusal(
        wan, f"{SHARDS[1]} repeats tensors", "blocks.0.ffn.0.bias", "every tensor in one shard"
    )


def test_shard_that_the_index_does_not_name_is_refused(wan: Path) -> None:
    save_file({"stray": torch.zeros(1)}, wan / "diffusion_pytorch_model.safetensors")
    expect_refusal(
        wan, f"{INDEX} does not list", "diffusion_pytorch_model.safetensors", "remove the files"
    )


# ---- pickles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VAE, T5])
def test_truncated_archive_is_named(name: str, wan: Path) -> None:
    cut_in_half(wan / name)
    expect_refusal(wan, f"{name} cannot be read", "end of the archive", "download it again")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_wants_to_run_code_is_not_loaded(
    zipped: bool, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pt"
    torch.save({"generator": RunsCode()}, hostile, _use_new_zipfile_serialization=zipped)
    expect_refusal(wan, "hostile.pt asks to execute code", "system", "tensors only", draft=hostile)
    assert not (tmp_path / "executed").exists()


def test_plain_pickle_is_not_loaded_either(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pt"
    hostile.write_bytes(pickle.dumps(RunsCode(), protocol=2))
    expect_refusal(wan, "hostile.pt asks to execute code", draft=hostile)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([torch.zeros(1)], "contains no state dict"),
        ({"generator": [torch.zeros(1)]}, "contains no state dict"),
        ({"step": 7, "weights": {}}, "no tensors in its members step, weights"),
        ({}, "an empty dictionary"),
        ({"head.bias": torch.zeros(1), "step": 7}, "objects that are not plain tensors"),
    ],
)
def test_pickle_of_something_else_is_refused(
    content: object, part: str, wan: Path, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "odd.pt")
    expect_refusal(wan, "odd.pt", part, draft=tmp_path / "odd.pt")


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64])
def test_quantised_tensor_in_a_pickle_is_named(dtype: torch.dtype, wan: Path) -> None:
    name = "decoder.conv1.weight"
    edit_pickle(wan / VAE, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    expect_refusal(wan, "integer or quantised", name, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_quantised_tensor_in_a_shard_is_named(dtype: torch.dtype, wan: Path) -> None:
    name = "blocks.0.ffn.0.bias"
    edit_shard(wan / SHARDS[0], lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    expect_refusal(wan, "integer or quantised", name, "bfloat16 or float16 or float32")


def test_missing_tensors_are_counted_and_the_first_are_named(wan: Path) -> None:
    def drop(tensors: State) -> None:
        for name in [name for name in tensors if name.startswith("decoder.middle.")]:
            del tensors[name]

    edit_pickle(wan / VAE, drop)
    expect_refusal(wan, f"{VAE} lacks tensors", "decoder.middle.0.residual.0.gamma", "(17 in all)")


def test_unknown_tensor_is_named(wan: Path) -> None:
    edit_pickle(wan / VAE, lambda tensors: tensors.update(stray=torch.zeros(1)))
    expect_refusal(wan, f"{VAE} has unknown tensors", "stray")


def test_unknown_text_encoder_tensor_is_named_as_in_its_file(wan: Path) -> None:
    edit_pickle(wan / T5, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(1)}))
    expect_refusal(wan, f"{T5} has unknown tensors", "lm_head.weight")


def test_wrong_shape_is_named_with_both_shapes(wan: Path) -> None:
    name = "decoder.middle.0.residual.0.gamma"
    edit_pickle(wan / VAE, lambda tensors: tensors.update({name: torch.zeros(31, 1, 1, 1)}))
    expect_refusal(wan, f"got: {name} [31, 1, 1, 1]", f"wanted: {name} [32, 1, 1, 1]")


def test_two_different_token_tables_are_refused(theirs: Path) -> None:
    alias = "encoder.embed_tokens.weight"
    edit_shard(
        theirs / "text_encoder" / "model.safetensors",
        lambda tensors: tensors.update({alias: tensors["shared.weight"] + 1}),
    )
    expect_refusal(theirs, "two different token tables", alias)


def test_diffusers_tensor_of_another_model_is_named(theirs: Path) -> None:
    file = theirs / "vae" / "diffusion_pytorch_model.safetensors"
    edit_shard(file, lambda tensors: tensors.update({"decoder.extra.weight": torch.zeros(1)}))
    expect_refusal(theirs, "vae has unknown tensors", "decoder.extra.weight")


# ---- config files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("dim", 128), ("ffn_dim", 7), ("num_layers", 4), ("out_dim", 16)]
)
def test_config_that_contradicts_the_shapes_is_refused(field: str, value: int, wan: Path) -> None:
    edit_json(wan / "config.json", **{field: value})
    expect_refusal(wan, "config.json disagrees", f"got: {field} = {value}", f"wanted: {field} = ")


def test_heads_that_do_not_divide_the_width_are_refused(wan: Path) -> None:
    edit_json(wan / "config.json", num_heads=7)
    expect_refusal(wan, "7 heads do not divide width 96", "config.json")


@pytest.mark.parametrize("value", [None, "3"])
def test_config_without_a_number_of_heads_is_refused(value: str | None, wan: Path) -> None:
    edit_json(wan / "config.json", num_heads=value)
    expect_refusal(wan, "config.json cannot be used", "num_heads")


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("transformer", "attention_head_dim", 16),
        ("vae", "base_dim", 8),
        ("vae", "temperal_downsample", [True, True, True]),
        ("vae", "num_res_blocks", 3),
        ("vae", "is_residual", False),
        ("vae", "latents_std", [1.0] * 16),
        ("text_encoder", "d_kv", 3),
        ("text_encoder", "feed_forward_proj", "gated-silu"),
    ],
)
def test_diffusers_config_that_contradicts_is_refused(
    file: str, field: str, value: object, theirs: Path
) -> None:
    edit_json(theirs / file / "config.json", **{field: value})
    expect_refusal(theirs, str(theirs / file))


def test_unknown_latent_statistics_are_refused(wan: Path) -> None:
    """Only the 48 channels of Wan2.2 have published numbers; guessing them ruins every colour."""

    def narrow(tensors: State) -> None:
        tensors["conv2.weight"] = torch.zeros(16, 16, 1, 1, 1)

    edit_pickle(wan / VAE, narrow)
    expect_refusal(wan, "latent mean and standard deviation", "16 of each", "vae/config.json")


def test_text_width_that_does_not_fit_the_encoder_is_refused(
    wan: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = official_state(checkpoint.base)["draft"]
    state["text_embedding.0.weight"] = torch.zeros(96, 41)
    torch.save({"generator": state}, tmp_path / "d.pt")
    expect_refusal(wan, "does not match", "41", "one family", draft=tmp_path / "d.pt")


def test_adapter_width_that_cannot_be_normalised_in_groups_is_refused(
    wan: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    content = torch.load(checkpoint.highres, weights_only=True)
    name = "model.spatial_adapter.backbone.0.weight"
    content["generator"][name] = torch.zeros(47, 48, 1, 1, 1)
    torch.save(content, tmp_path / "h.pt")
    expect_refusal(wan, "impossible widths", "47", highres=tmp_path / "h.pt")


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_tensors_without_plain_data_are_refused(wan: Path, odd: torch.Tensor) -> None:
    """Seen: a sparse tensor ended the conversion with a traceback."""
    state = torch.load(wan / "Wan2.2_VAE.pth", weights_only=True)
    torch.save(state | {"odd": odd}, wan / "Wan2.2_VAE.pth")
    expect_refusal(wan, "objects that are not plain tensors", "odd")


@pytest.mark.parametrize(("key", "value"), [("num_heads", 32), ("freq_dim", 7)])
def test_config_that_makes_no_transformer_is_refused(wan: Path, key: str, value: float) -> None:
    """Seen: these converted, and failed in the middle of a generation (32 heads: odd width 3)."""
    edit_json(wan / "config.json", **{key: value})
    expect_refusal(wan, "config.json")
