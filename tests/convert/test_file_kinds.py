# SPDX-License-Identifier: Apache-2.0
"""What is no tensor file, or holds another thing than it should, is named for what it is."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_export.checkpoints.file_kinds import require_undamaged
from pw_export.checkpoints.sources import read_network, read_pixelwizard
from pw_export.checkpoints.tokenizer_files import require_tokenizer
from pw_runtime.errors import BadWeights, PixelWizardError
from tests.convert.layouts import INDEX, SHARDS, T5, VAE, official_state, quietly
from tests.oracle.checkpoint import Checkpoint


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "hello")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return buffer.getvalue()


def _safetensors(header: object, data: bytes = bytes(4)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1234567\n"
FOREIGN: list[tuple[str, bytes, str, str]] = [
    ("empty", b"", "an empty file", "download it again"),
    ("zeros", bytes(4000), "zeros: room that a download reserved", "download it again"),
    ("LFS", LFS, "a Git LFS pointer to 1,234,567 bytes", "`git lfs pull`"),
    ("page", b"\n<!DOCTYPE html><html>", "a web page", "download it again"),
    ("XML", b"<?xml version='1.0'?><Error/>", "a web page", "download it again"),
    ("answer", b'{"error":"Invalid password."}', "text that begins", "server's answer"),
    ("GGUF", b"GGUF\x03\x00\x00\x00" + bytes(range(90)), "a GGUF file", ".safetensors or .pth"),
    ("zip", _zip("model/readme.txt"), "a zip archive of model/readme.txt", "unpack it"),
    (
        "program",
        _zip("m/data.pkl", "m/constants.pkl", "m/code/m.py"),
        "a TorchScript program",
        "save the state_dict",
    ),
    ("tar", _tar(), "a tar archive", "unpack it"),
    ("gzip", b"\x1f\x8b\x08" + bytes(50), "a gzip archive", "unpack it"),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7-Zip archive", "unpack it"),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file", "weight file"),
    ("NumPy", b"\x93NUMPY\x01\x00v\x00", "a NumPy array", "weight file"),
    ("PNG", b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG picture", "weight file"),
    ("mp4", b"\x00\x00\x00\x20ftypisom" + bytes(50), "an mp4 video", "weight file"),
    ("noise", b"\xf6\x9d\x01\xc5" * 90, "begins with the bytes f6 9d 01 c5", "download it again"),
    ("pickle", b"\x80\x02garbage", "a pickle that is damaged", "download it again"),
    ("one byte", b"\x80", "begins with the bytes 80", "download it again"),
    ("archive", b"PK\x03\x04" + bytes(90), "the end of the archive is missing", "download it"),
    ("header", struct.pack("<Q", 900) + b"{", "only 9 of 908 bytes", "download it again"),
    ("JSON", _safetensors(b'{"a":'), "cannot be read", "download it again"),
    ("deep", _safetensors(b'{"a":' * 4000 + b"1" + b"}" * 4000), "cannot be read", "download it"),
    (
        "short",
        _safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
        "only 74 of 106 bytes",
        "download it again",
    ),
]


def refusal(
    checkpoint: Checkpoint, folder: Path, draft: Path | None, wan: Path | None = None
) -> str:
    """Return the message with which a conversion is refused; nothing of torch's is in it."""
    with pytest.raises(PixelWizardError) as caught:
        quietly(folder / "bundle", wan=wan or checkpoint.base, draft=draft)
    message = str(caught.value)
    assert "do this: " in message
    assert "weights_only" not in message
    assert "torch.load" not in message
    assert not (folder / "bundle").exists()
    return message


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [row[1:] for row in FOREIGN],
    ids=[row[0] for row in FOREIGN],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_file_without_tensors_is_named_by_its_content(
    name: str, content: bytes, what: str, remedy: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    if what.startswith("a pickle") and name.endswith(".safetensors"):
        what, remedy = "a PyTorch checkpoint with the name of a safetensors file", "rename it"
    message = refusal(checkpoint, tmp_path, tmp_path / name)
    assert what in message
    assert remedy in message
    assert f"{name} cannot be read" in message


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "a named pipe"),
        (Path.mkdir, "a folder, with nothing in it"),
        (lambda path: path.symlink_to(path.parent / "gone"), "a symbolic link to a file that is"),
        (lambda path: path.symlink_to(path), "a symbolic link"),
        (lambda path: path.symlink_to("/dev/zero"), "a named pipe, a socket or a device"),
        (lambda path: (path.parent / "other.pt").touch(), "No such file or directory; "),
    ],
)
def test_path_that_is_no_plain_file_is_refused_and_never_waited_for(
    make: Callable[[Path], object], what: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    make(tmp_path / "d.pt")
    assert what in refusal(checkpoint, tmp_path, tmp_path / "d.pt")


@pytest.mark.parametrize(
    "name", [VAE, T5, INDEX, SHARDS[0], "config.json", "google/umt5-xxl/tokenizer.json"]
)
def test_link_whose_target_was_never_downloaded_is_named(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Seen: the cache of a hub holds links to files; one without its file was passed over."""
    wan = shutil.copytree(checkpoint.base, tmp_path / "wan")
    (wan / name).unlink()
    (wan / name).symlink_to("../../blobs/abc")
    message = refusal(checkpoint, tmp_path, None, wan)
    assert f"{name} cannot be read" in message
    assert "a symbolic link to a file that is not there" in message


@pytest.mark.parametrize("inner", ["Wan2.2-TI2V-5B", "snapshots/0123abc"])
def test_folder_above_the_checkpoint_is_refused_with_the_right_one(
    inner: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "above" / inner).parent.mkdir(parents=True)
    (tmp_path / "above" / inner).symlink_to(checkpoint.base)
    message = refusal(checkpoint, tmp_path, None, tmp_path / "above")
    assert f"do this: pass {tmp_path / 'above' / inner}" in message


def test_tokenizer_that_the_runtime_could_not_read_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = shutil.copytree(checkpoint.base, tmp_path / "wan")
    tokenizer = wan / "google" / "umt5-xxl"
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    (tokenizer / "spiece.model").write_bytes(b"no pieces")
    message = refusal(checkpoint, tmp_path, None, wan)
    assert "has no tokenizer that can be read" in message
    assert "wanted: tokenizer.json" in message


def test_missing_file_is_named_beside_what_lies_there(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "model(1).pt").touch()
    assert "has model(1).pt" in refusal(checkpoint, tmp_path, tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"args": argparse.Namespace(a=1), "model": {}}, "argparse.Namespace"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.zeros(3), "got: Tensor"),
        (None, "got: NoneType"),
        ({"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}, "such as exp_avg"),
        ({"state": {i: {"m": torch.zeros(3)} for i in range(2)}}, "state.0, state.1"),
        ({0: torch.zeros(3)}, "0 (1, such as 0)"),
    ],
)
def test_checkpoint_of_other_objects_is_refused_without_words_of_torch(
    content: object, what: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "d.pt")
    assert what in refusal(checkpoint, tmp_path, tmp_path / "d.pt")


def test_dictionary_that_holds_itself_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["x"] = content
    torch.save(content, tmp_path / "d.pt")
    assert "no tensors in its members x" in refusal(checkpoint, tmp_path, tmp_path / "d.pt")


def test_format_is_told_by_content_not_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_file(official_state(checkpoint.base)["draft"], tmp_path / "d.pt")
    assert quietly(tmp_path / "b", wan=checkpoint.base, draft=tmp_path / "d.pt")


def _lora(template: str, down: str, up: str, ranks: list[int]) -> dict[str, torch.Tensor]:
    state = {}
    for block, rank in enumerate(ranks):
        state[template.format(block) + down] = torch.zeros(rank, 96)
        state[template.format(block) + up] = torch.zeros(96, rank)
    return state


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (
            _lora("diffusion_model.blocks.{}.ffn.0", ".lora_A.weight", ".lora_B.weight", [32] * 30),
            "a LoRA of 30 layers, rank 32",
        ),
        (
            _lora("lora_unet_blocks_{}_ffn_0", ".lora_down.weight", ".lora_up.weight", [4, 8, 128]),
            "a LoRA of 3 layers, ranks 4 to 128",
        ),
        (
            _lora("transformer.blocks.{}.attn1.to_q", ".lora_A.default.weight", ".lora_B", [16]),
            "a LoRA of 1 layers, rank 16",
        ),
        (
            {
                "blocks.0.ffn.0.diff": torch.zeros(2, 2),
                "blocks.0.self_attn.q.weight": torch.zeros(2, 2),
            },
            "a LoRA without low-rank factors",
        ),
        ({"decoder.upsamples.0.residual.0.gamma": torch.zeros(3)}, "the VAE of Wan2.1"),
        (
            {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3)},
            "a T5 text encoder, not UMT5",
        ),
        ({"decoder.up.0.block.0.norm1.weight": torch.zeros(3)}, "a VAE of another family"),
        ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)}, "a transformer of another"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3)}, "a language model"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3)}, "a CLIP text encoder"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_lora_or_network_of_another_family_is_named(
    suffix: str, state: dict[str, torch.Tensor], what: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / f"model{suffix}"
    torch.save(state, file) if suffix == ".pt" else save_file(state, file)
    message = refusal(checkpoint, tmp_path, file)
    assert f"got: {what}" in message
    assert "is not a transformer" in message
    assert ("this file to --lora" in message) == ("LoRA" in what)


@pytest.mark.parametrize(
    ("place", "content", "wanted", "got"),
    [
        ("draft", "vae", "transformer", "a Wan2.2 VAE"),
        ("draft", "text_encoder", "transformer", "a UMT5 text encoder"),
        (VAE, "draft", "VAE", "a Wan transformer"),
        (VAE, "text_encoder", "VAE", "a UMT5 text encoder"),
        (T5, "vae", "text encoder", "a Wan2.2 VAE"),
        (T5, "draft", "text encoder", "a Wan transformer"),
    ],
)
def test_network_in_the_place_of_another_is_named(
    place: str, content: str, wanted: str, got: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = official_state(checkpoint.base)[content]
    wan = tmp_path / "wan"
    wan.mkdir()
    for file in checkpoint.base.iterdir():
        (wan / file.name).symlink_to(file)
    target = tmp_path / "d.pt" if place == "draft" else wan / place
    target.unlink(missing_ok=True)
    torch.save(state, target)
    message = refusal(checkpoint, tmp_path, target if place == "draft" else None, wan)
    assert f"is not a {wanted}" in message
    assert f"got: {got}" in message
    assert "and this file where the" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [LFS, b"", b"<html>404</html>"])
def test_remains_of_a_download_in_the_tokenizer_are_named(
    name: str, content: bytes, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "wan" / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    for file in checkpoint.base.iterdir():
        if file.name != "google":
            (tmp_path / "wan" / file.name).symlink_to(file)
    for file in (checkpoint.base / "google" / "umt5-xxl").iterdir():
        (tokenizer / file.name).write_bytes(file.read_bytes())
    (tokenizer / name).write_bytes(content)
    message = refusal(checkpoint, tmp_path, None, tmp_path / "wan")
    assert f"{name} cannot be read" in message


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 1}}'),
    ],
)
def test_damaged_tokenizer_is_one_clear_error(
    name: str, damage: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Seen: a tokenizer.json of {} raised a KeyError."""
    tokenizer = shutil.copytree(checkpoint.base / "google" / "umt5-xxl", tmp_path / "tokenizer")
    (tokenizer / name).write_text(damage, encoding="utf-8")
    with pytest.raises(BadWeights, match=r"cannot read the tokenizer[\s\S]*do this: download"):
        require_tokenizer(tokenizer, 400)


def test_tokenizer_with_more_tokens_than_the_table_has_rows_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadWeights, match=r"not the tokenizer of this text encoder[\s\S]*at most 9"):
        require_tokenizer(checkpoint.base / "google" / "umt5-xxl", 9)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_pickle_with_a_flipped_byte_is_refused_by_its_own_checksum(
    tmp_path: Path, place: float
) -> None:
    torch.save({"x": torch.randn(4096), "y": torch.randn(4096)}, tmp_path / "whole.pt")
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    require_undamaged(tmp_path / "whole.pt")
    content[int(len(content) * place)] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    assert torch.load(tmp_path / "flipped.pt", weights_only=True).keys() == {"x", "y"}  # silent
    with pytest.raises(BadWeights, match=r"is damaged\n  got: another CRC-32 .*data/"):
        read_network(tmp_path / "flipped.pt", lambda _: None)


def test_a_pickle_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.randn(8)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    require_undamaged(tmp_path / "x.pt")
    assert list(read_network(tmp_path / "x.pt", lambda _: None)) == ["x"]


@pytest.mark.parametrize("name", ["model-00002-of-00003", "diffusion_pytorch_model-00001-of-00002"])
def test_one_part_of_several_files_is_named_as_a_part(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadWeights, match=r"is one part of .*\n  got: part [12] of [23]"):
        read_pixelwizard(tmp_path / f"{name}.safetensors", ema=False, say=lambda _: None)


def test_a_single_part_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    refs, _ = read_pixelwizard(path, ema=False, say=lambda _: None)
    assert list(refs) == ["x"]
