# SPDX-License-Identifier: Apache-2.0
"""Networks are found in single files of any name, in the folders that repackagers use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_export.convert import convert
from pw_runtime.checkpoint import keymaps
from pw_runtime.errors import BadRequest, BadWeights
from tests.convert.layouts import (
    INDEX,
    SHARDS,
    T5,
    VAE,
    State,
    holds,
    official_state,
    quietly,
    write_diffusers,
)
from tests.oracle.checkpoint import Checkpoint

COMFY = {
    "draft": "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
    "vae": "vae/wan2.2_vae.safetensors",
    "text_encoder": "text_encoders/umt5_xxl_fp16.safetensors",
}
FLAT = {"draft": "dit.safetensors", "vae": "Wan2_2_VAE_bf16.safetensors", "text_encoder": "a.sft"}
OLD = {
    "draft": "unet/x.safetensors",
    "vae": "vae/x.safetensors",
    "text_encoder": "clip/x.safetensors",
}


@pytest.fixture(scope="module")
def states(checkpoint: Checkpoint) -> dict[str, State]:
    """Load all tensors with the names of a bundle."""
    return official_state(checkpoint.base)


def write(
    wan: Path, checkpoint: Checkpoint, states: dict[str, State], files: dict[str, str]
) -> Path:
    """Write networks as single files, beside config.json and the tokenizer."""
    for network, name in files.items():
        (wan / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(states[network], wan / name)
    shutil.copy(checkpoint.base / "config.json", wan)
    shutil.copytree(checkpoint.base / "google", wan / "google")
    return wan


@pytest.mark.parametrize("files", [COMFY, FLAT, OLD], ids=["ComfyUI", "flat", "old"])
@pytest.mark.parametrize("parent", ["", "split_files/", "models/"])
def test_single_files_are_found_by_their_content(
    parent: str,
    files: dict[str, str],
    checkpoint: Checkpoint,
    states: dict[str, State],
    tmp_path: Path,
) -> None:
    inside = {network: parent + name for network, name in files.items()}
    wan = write(tmp_path / "wan", checkpoint, states, inside)
    bundle = quietly(tmp_path / "b", wan=wan)
    assert all(holds(bundle, network, state) for network, state in states.items())
    assert bundle.manifest.source == {"layout": "single files", "wan": "wan", **inside}


def test_a_tokenizer_beside_the_weights_is_copied_without_them(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    wan = write(tmp_path / "wan", checkpoint, states, FLAT)
    for file in (wan / "google/umt5-xxl").iterdir():
        file.rename(wan / file.name)
    shutil.rmtree(wan / "google")
    quietly(tmp_path / "bundle", wan=wan)
    copied = {file.name for file in (tmp_path / "bundle" / "tokenizer").iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json"}


def test_names_of_other_libraries_are_translated_in_single_files_too(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    text = torch.load(checkpoint.base / T5, weights_only=True)
    theirs = {
        "draft": {str(keymaps.dit_to_diffusers(n)): t for n, t in states["draft"].items()},
        "vae": {str(keymaps.vae_to_diffusers(n)): t for n, t in states["vae"].items()},
        "text_encoder": text,
    }
    wan = write(tmp_path / "wan", checkpoint, theirs, COMFY)
    bundle = quietly(tmp_path / "b", wan=wan)
    assert all(holds(bundle, network, state) for network, state in states.items())


@pytest.mark.parametrize("replaced", [["vae"], ["text_encoder"], ["draft"], ["vae", "draft"]])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_layouts_may_be_mixed(
    layout: str,
    replaced: list[str],
    checkpoint: Checkpoint,
    states: dict[str, State],
    tmp_path: Path,
) -> None:
    wan = tmp_path / "wan"
    if layout == "official":
        shutil.copytree(checkpoint.base, wan)
        theirs = {"draft": [*SHARDS, INDEX], "vae": [VAE], "text_encoder": [T5]}
    else:
        write_diffusers(wan, checkpoint.base)
        shutil.copy(checkpoint.base / "config.json", wan)
        theirs = {"draft": ["transformer"], "vae": ["vae"], "text_encoder": ["text_encoder"]}
    for network in replaced:
        for name in theirs[network]:
            path = wan / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (wan / COMFY[network]).parent.mkdir(exist_ok=True)
        save_file(states[network], wan / COMFY[network])
    bundle = quietly(tmp_path / "b", wan=wan)
    assert all(holds(bundle, network, state) for network, state in states.items())


def test_of_two_layouts_the_official_one_is_taken_and_the_other_is_named(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    """Seen: diffusers' transformer beside the official VAE and text encoder, without a word."""
    wan = write_diffusers(tmp_path / "wan", checkpoint.base)
    shutil.copytree(checkpoint.base, wan, dirs_exist_ok=True)
    doubled = {name: 2 * x for name, x in states["draft"].items()}
    (wan / "unet").mkdir()
    save_file(doubled, wan / "unet" / "other.safetensors")
    lines: list[str] = []
    bundle = convert(wan=wan, out=tmp_path / "b", say=lines.append)
    assert all(holds(bundle, network, state) for network, state in states.items())
    told = [line for line in lines if ", not " in line]
    assert told == [
        f"VAE: {VAE}, not vae/",
        f"text encoder: {T5}, not text_encoder/",
        "transformer: diffusion_pytorch_model*, not transformer/, unet/other.safetensors",
    ]


def test_tokenizer_inside_a_text_encoder_is_left_out_with_a_notice(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    spiece = {"spiece_model": torch.zeros(99, dtype=torch.uint8)}
    changed = {**states, "text_encoder": {**states["text_encoder"], **spiece}}
    wan = write(tmp_path / "wan", checkpoint, changed, COMFY)
    lines: list[str] = []
    bundle = convert(wan=wan, out=tmp_path / "b", say=lines.append)
    assert holds(bundle, "text_encoder", states["text_encoder"])
    assert "umt5_xxl_fp16.safetensors: left out 1 spiece_model" in "\n".join(lines)
    shutil.rmtree(wan / "google")
    with pytest.raises(BadWeights, match=r"contains no tokenizer[\s\S]*google/umt5-xxl"):
        quietly(tmp_path / "b2", wan=wan)


def test_marker_outside_the_prefix_of_the_other_names_hides_no_file(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    prefixed = {f"model.diffusion_model.{n}": t for n, t in states["draft"].items()}
    marker = {"scaled_fp8": torch.zeros(2)}
    wan = write(tmp_path / "wan", checkpoint, {**states, "draft": {**prefixed, **marker}}, COMFY)
    assert holds(quietly(tmp_path / "b", wan=wan), "draft", states["draft"])


def test_files_of_other_models_in_the_same_folders_are_passed_over(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    wan = write(tmp_path / "wan", checkpoint, states, COMFY)
    save_file(
        {"decoder.upsamples.0.residual.0.gamma": torch.ones(3)}, wan / "vae/wan_2.1_vae.safetensors"
    )
    save_file(
        {"blocks.0.ffn.0.lora_A.weight": torch.ones(3, 3)},
        wan / "diffusion_models/lora.safetensors",
    )
    t5 = {n: t for n, t in states["text_encoder"].items() if "1.layer.0" not in n}
    save_file(t5, wan / "text_encoders" / "t5xxl_fp16.safetensors")
    (wan / "text_encoders" / "broken.safetensors").write_bytes(b"<html>")
    larger = {"patch_embedding.weight": torch.zeros(160, 36, 1, 2, 2)}
    save_file({**states["draft"], **larger}, wan / "diffusion_models/wan2.2_i2v_14B.safetensors")
    lines: list[str] = []
    bundle = convert(wan=wan, out=tmp_path / "b", say=lines.append)
    assert all(holds(bundle, network, state) for network, state in states.items())
    only = "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors: the only one of TI2V-5B, not "
    assert f"{only}diffusion_models/wan2.2_i2v_14B.safetensors" in lines


@pytest.mark.parametrize(
    ("network", "role"),
    [("draft", "transformer"), ("vae", "VAE"), ("text_encoder", "text encoder")],
)
def test_missing_network_is_named_beside_everything_that_lies_there(
    network: str, role: str, checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    wan = write(tmp_path / "wan", checkpoint, states, COMFY)
    folder = (wan / COMFY[network]).parent
    (wan / COMFY[network]).unlink()
    (folder / "q4.gguf").write_bytes(b"GGUF" + bytes(range(90)))
    (folder / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    torch.save({}, folder / "other.pth")
    with pytest.raises(BadWeights, match=f"holds no {role} of Wan2.2-TI2V-5B") as caught:
        quietly(tmp_path / "b", wan=wan)
    message = str(caught.value)
    for part in (
        f"{folder.name}/q4.gguf (a GGUF file",
        f"{folder.name}/pointer.safetensors (a Git LFS pointer",
        f"{folder.name}/other.pth (a PyTorch checkpoint, read under its published name only",
        "config.json, diffusion_models, google, text_encoders, vae",
        "a .safetensors file",
    ):
        assert part in message


def test_two_files_for_one_network_are_named(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    wan = write(tmp_path / "wan", checkpoint, states, COMFY)
    (wan / "unet").mkdir()
    save_file(states["draft"], wan / "unet" / "second.safetensors")
    with pytest.raises(BadWeights, match=r"more than one transformer[\s\S]*unet/second"):
        quietly(tmp_path / "b", wan=wan)


def test_without_config_heads_are_128_wide_or_the_file_is_asked_for(
    checkpoint: Checkpoint, states: dict[str, State], tmp_path: Path
) -> None:
    from pw_export.checkpoints.configs import dit_config
    from pw_export.checkpoints.tensor_refs import Ref

    wan = write(tmp_path / "wan", checkpoint, states, COMFY)
    (wan / "config.json").unlink()
    with pytest.raises(BadWeights, match=r"number of heads[\s\S]*width 96[\s\S]*config\.json"):
        quietly(tmp_path / "b", wan=wan)
    shapes = {name: tensor.shape for name, tensor in states["draft"].items()}
    shapes["patch_embedding.weight"] = torch.Size([3072, 48, 1, 2, 2])
    refs = {name: Ref(tuple(shape), "float32", torch.Tensor) for name, shape in shapes.items()}
    assert dit_config("x", refs, None, {}).num_heads == 24


def test_single_file_as_checkpoint_folder_is_refused_with_the_right_option(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=r"a file[\s\S]*--draft"):
        quietly(tmp_path / "b", wan=checkpoint.highres)
