# SPDX-License-Identifier: Apache-2.0
"""Every layout becomes the same bundle, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import pw_export.convert
from pw_runtime.checkpoint.bundle import load_tensors, open_bundle, sha256_of, verify
from tests.convert.layouts import (
    INDEX,
    SHARDS,
    T5,
    edit_json,
    edit_pickle,
    holds,
    official_state,
    pixelwizard_state,
    quietly,
    write_diffusers,
    write_network,
)
from tests.oracle.checkpoint import Checkpoint


def test_official_checkpoint_keeps_every_tensor_and_dtype(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bundle = quietly(tmp_path / "b", wan=checkpoint.base, highres=checkpoint.highres)
    state = official_state(checkpoint.base)
    assert holds(bundle, "draft", state["draft"])
    assert holds(bundle, "vae", state["vae"])
    assert holds(bundle, "text_encoder", state["text_encoder"])
    assert holds(bundle, "highres", pixelwizard_state(checkpoint.highres))
    assert bundle.networks.draft.dtype == "float32"
    assert bundle.networks.text_encoder.dtype == "bfloat16"
    assert bundle.manifest.source == {
        "layout": "official",
        "wan": "base",
        "highres": f"{checkpoint.highres.parent.name}/highres.pt:generator",
    }


def test_draft_checkpoint_replaces_the_base_whose_shards_may_be_absent(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoint.base, tmp_path / "base")
    for name in (*SHARDS, INDEX):
        (base / name).unlink()
    assert checkpoint.draft is not None
    bundle = quietly(tmp_path / "b", wan=base, draft=checkpoint.draft)
    assert holds(bundle, "draft", pixelwizard_state(checkpoint.draft))
    assert bundle.networks.highres is None


def test_diffusers_layout_gives_the_same_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    theirs = write_diffusers(tmp_path / "theirs", checkpoint.base)
    first = quietly(tmp_path / "one", wan=checkpoint.base)
    two = quietly(tmp_path / "two", wan=theirs)
    assert two.files == first.files
    assert two.networks.vae == first.networks.vae
    assert two.networks.text_encoder == first.networks.text_encoder
    assert two.manifest.source["layout"] == "diffusers"


def test_same_checkpoint_gives_the_same_bundle(checkpoint: Checkpoint, tmp_path: Path) -> None:
    digests = {quietly(tmp_path / name, wan=checkpoint.base).digest for name in ("one", "two")}
    assert len(digests) == 1


def test_real_diffusers_and_transformers_folders_convert(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Built and saved by the libraries themselves, so their config files and names are real."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    wan = tmp_path / "wan"
    state = official_state(checkpoint.base)
    written = write_diffusers(tmp_path / "mapped", checkpoint.base)
    transformer = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=48,
        out_channels=48,
        text_dim=state["text_encoder"]["shared.weight"].shape[1],
        ffn_dim=208,
        num_layers=3,
    )
    transformer.load_state_dict(
        {n: t for s in SHARDS for n, t in load_file(written / "transformer" / s).items()}
    )
    transformer.save_pretrained(wan / "transformer", max_shard_size="1MB")
    assert (wan / "transformer" / INDEX).exists()
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.5] * 48,
        latents_std=[2.0] * 48,
    )
    vae.load_state_dict(load_file(written / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.save_pretrained(wan / "vae")
    text = state["text_encoder"]
    heads = text["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=text["shared.weight"].shape[0],
            d_model=text["shared.weight"].shape[1],
            d_kv=text["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
            d_ff=text["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
            num_heads=heads,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    ).bfloat16()
    encoder.load_state_dict({**text, "encoder.embed_tokens.weight": text["shared.weight"]})
    encoder.save_pretrained(wan / "text_encoder")
    shutil.copytree(checkpoint.base / "google" / "umt5-xxl", wan / "tokenizer")

    bundle = quietly(tmp_path / "b", wan=wan)
    assert holds(bundle, "draft", state["draft"])
    assert holds(bundle, "vae", state["vae"])
    assert holds(bundle, "text_encoder", state["text_encoder"])
    assert bundle.networks.vae.config.latent_std == (2.0,) * 48
    assert bundle.networks.draft.config.num_heads == 3


@pytest.mark.parametrize("saved", ["alias only", "both"])
def test_tied_token_table_is_kept_once(saved: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    wan = write_diffusers(tmp_path / "wan", checkpoint.base)
    file = wan / "text_encoder" / "model.safetensors"
    text = load_file(file)
    table = text["shared.weight"]
    tied = {**text, "encoder.embed_tokens.weight": table.clone()}
    if saved != "both":
        del tied["shared.weight"]
    save_file(tied, file)
    bundle = quietly(tmp_path / "b", wan=wan)
    assert holds(bundle, "text_encoder", text)


def test_mixed_dtypes_are_kept_and_stated(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = shutil.copytree(checkpoint.base, tmp_path / "base")
    edit_pickle(base / T5, lambda t: t.update({"norm.weight": t["norm.weight"].float()}))
    bundle = quietly(tmp_path / "b", wan=base)
    assert bundle.networks.text_encoder.dtype == "bfloat16+float32"
    tensors = load_tensors(bundle, "text_encoder")
    assert tensors["encoder.final_layer_norm.weight"].dtype == torch.float32


def test_old_pickles_without_a_zip_convert_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = shutil.copytree(checkpoint.base, tmp_path / "base")
    text = torch.load(base / T5, weights_only=True)
    torch.save(text, base / T5, _use_new_zipfile_serialization=False)
    bundle = quietly(tmp_path / "b", wan=base)
    assert holds(bundle, "text_encoder", official_state(checkpoint.base)["text_encoder"])


def test_transposed_views_are_written_by_value(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = shutil.copytree(checkpoint.base, tmp_path / "base")
    name = "blocks.0.attn.q.weight"
    edit_pickle(base / T5, lambda t: t.update({name: t[name].T.contiguous().T}))
    bundle = quietly(tmp_path / "b", wan=base)
    assert holds(bundle, "text_encoder", official_state(checkpoint.base)["text_encoder"])


def test_large_networks_are_cut_into_shards_that_fit_the_limit(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200_000
    monkeypatch.setattr(pw_export.convert, "SHARD_BYTES", limit)
    bundle = quietly(tmp_path / "b", wan=checkpoint.base)
    files = bundle.networks.draft.files
    assert len(files) > 3
    assert files[0] == f"draft/model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(bundle.root / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert holds(bundle, "draft", official_state(checkpoint.base)["draft"])


def test_bundle_lists_every_file_with_its_digest_and_verifies(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bundle = quietly(tmp_path / "b", wan=checkpoint.base)
    files = {str(f.relative_to(bundle.root)) for f in bundle.root.rglob("*") if f.is_file()}
    assert files == {*bundle.files, "bundle.json"}
    assert bundle.digest == sha256_of(bundle.root / "bundle.json")
    assert open_bundle(bundle.root) == bundle
    verify(bundle)
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


def test_files_are_as_readable_as_the_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """safetensors leaves its files private to the user who ran the conversion."""
    bundle = quietly(tmp_path / "b", wan=checkpoint.base)
    for name in bundle.files:
        file = bundle.root / name
        assert file.stat().st_mode & 0o777 == file.parent.stat().st_mode & 0o666


def test_tokenizer_is_copied_whole_and_loads(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = shutil.copytree(checkpoint.base, tmp_path / "base")
    (base / "google" / "umt5-xxl" / "cache").mkdir()
    bundle = quietly(tmp_path / "b", wan=base)
    source = base / "google" / "umt5-xxl"
    copied = {file.name: file.read_bytes() for file in bundle.tokenizer.iterdir()}
    assert copied == {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    tokenizer = AutoTokenizer.from_pretrained(bundle.tokenizer, local_files_only=True)
    assert tokenizer("a fox").input_ids[-1] == 1


def test_single_file_transformer_without_index_converts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = write_diffusers(tmp_path / "wan", checkpoint.base)
    folder = wan / "transformer"
    config = (folder / "config.json").read_text()
    state = {n: t for shard in SHARDS for n, t in load_file(folder / shard).items()}
    shutil.rmtree(folder)
    write_network(folder, "diffusion_pytorch_model", state, {})
    (folder / "config.json").write_text(config)
    assert holds(
        quietly(tmp_path / "b", wan=wan), "draft", official_state(checkpoint.base)["draft"]
    )


def test_progress_names_networks_tensors_and_sizes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    lines: list[str] = []
    pw_export.convert.convert(wan=checkpoint.base, out=tmp_path / "b", say=lines.append)
    assert any(line.startswith("vae: 196 tensors, ") and "GiB" in line for line in lines)
    assert lines[-1] == f"wrote {tmp_path / 'b'}"


def test_other_latent_statistics_come_from_the_config_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = write_diffusers(tmp_path / "wan", checkpoint.base)
    edit_json(wan / "vae" / "config.json", latents_mean=[0.25] * 48)
    assert quietly(tmp_path / "b", wan=wan).networks.vae.config.latent_mean == (0.25,) * 48
