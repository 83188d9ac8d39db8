# SPDX-License-Identifier: Apache-2.0
"""Bad input and faults: one clear error, the right exit code, nothing lost, nothing broken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_runtime import pipeline
from pw_runtime.errors import WriteFailed
from tests.e2e.pw import Pw, latent_shapes


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path):
    """Run `pw generate` with good defaults; arguments that come later win."""

    def run(*arguments: object):
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            *arguments,
        )  # fmt: skip

    return run


def nothing_made(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


def test_missing_prompt_file(generate, tmp_path) -> None:
    ended = generate("--prompts", tmp_path / "none.txt")
    assert ended.code == 2
    assert "none.txt" in ended.err
    assert nothing_made(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "\n  \n\n"])
def test_prompt_file_without_prompts(generate, tmp_path, content) -> None:
    (tmp_path / "p.txt").write_text(content)
    ended = generate("--prompts", tmp_path / "p.txt")
    assert ended.code == 2
    assert "holds no prompt" in ended.err


def test_prompt_file_that_is_not_utf8(generate, tmp_path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    ended = generate("--prompts", tmp_path / "p.txt")
    assert ended.code == 2
    assert "UTF-8" in ended.err
    assert "offset 3" in ended.err


def test_malformed_json_line_is_named(generate, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a cat"}\n\n{"text": oops}\n')
    ended = generate("--prompts", tmp_path / "p.jsonl")
    assert ended.code == 2
    assert "line 3" in ended.err


def test_neither_or_both_kinds_of_prompts(generate, tmp_path) -> None:
    assert generate().code == 2
    ended = generate("--prompt", "cat", "--prompts", tmp_path / "p.txt")
    assert ended.code == 2
    assert "--prompts FILE or --prompt TEXT" in ended.err


def test_unknown_preset_names_the_known_ones(generate) -> None:
    ended = generate("--prompt", "cat", "--preset", "8k")
    assert ended.code == 2
    assert "4k-5step" in ended.err


def test_unknown_option_is_refused(generate) -> None:
    ended = generate("--prompt", "cat", "--guidence", "3")
    assert ended.code == 2
    assert "--guidence" in ended.err


def test_noise_of_the_wrong_shape(generate, tmp_path) -> None:
    shapes = latent_shapes()
    noise = {name: torch.zeros(*shape) for name, shape in shapes.items()}
    noise["highres_noise"] = torch.zeros(48, 2, 6, 14)
    save_file(noise, tmp_path / "noise.safetensors")
    ended = generate("--prompt", "cat", "--noise", tmp_path / "noise.safetensors")
    assert ended.code == 2
    assert "[48, 2, 6, 14]" in ended.err
    assert "[48, 2, 6, 12]" in ended.err


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all"])
def test_noise_file_that_cannot_be_read(generate, tmp_path, content) -> None:
    (tmp_path / "noise.safetensors").write_bytes(content)
    ended = generate("--prompt", "cat", "--noise", tmp_path / "noise.safetensors")
    assert ended.code == 2
    assert "cannot read the noise file" in ended.err


def test_damaged_bundle_is_found_before_anything_is_computed(
    generate, bundle_dir, tmp_path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_dir, damaged)
    shard = next((damaged / "vae").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ended = generate("--prompt", "cat", "--model", damaged)
    assert ended.code == 2
    assert shard.name in ended.err
    assert "draft 0" not in ended.err


def test_published_checkpoint_instead_of_a_bundle(generate, checkpoint) -> None:
    ended = generate("--prompt", "cat", "--model", checkpoint.base)
    assert ended.code == 2
    assert "pw convert" in ended.err


def test_output_folder_that_is_a_file(generate, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    ended = generate("--prompt", "cat", "--out", tmp_path / "file" / "out")
    assert ended.code == 2
    assert "output folder" in ended.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(generate, tmp_path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    ended = generate("--prompt", "cat", "--out", tmp_path / "closed")
    assert ended.code == 2
    assert "no permission" in ended.err


def test_device_that_is_not_there(generate) -> None:
    ended = generate("--prompt", "cat", "--device", "cuda:63")
    assert ended.code == 2
    assert "cuda:63" in ended.err


def test_ids_that_cannot_name_a_file(generate, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "../up", "text": "a cat"}\n')
    ended = generate("--prompts", tmp_path / "p.jsonl")
    assert ended.code == 2
    assert "'../up'" in ended.err


def test_two_prompts_with_one_id(generate, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n')
    ended = generate("--prompts", tmp_path / "p.jsonl")
    assert ended.code == 2
    assert "two prompts" in ended.err


def test_a_prompt_that_fails_leaves_the_others_and_its_latents(
    generate, tmp_path, monkeypatch
) -> None:
    """A disk that is full at the first clip: exit 3, second clip made, latents kept."""
    write_video = pipeline.write_video

    def full_disk(chunks, path, **arguments):
        if path.name == "0.mp4":
            raise WriteFailed(f"cannot write {path}", got="No space left on device")
        return write_video(chunks, path, **arguments)

    monkeypatch.setattr(pipeline, "write_video", full_disk)
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    out = tmp_path / "out"
    assert ended.code == 3
    assert "No space left" in ended.err
    assert "1 of 2 prompts failed: 0" in ended.err
    assert ended.out.split() == [str(out / "1.mp4")]
    assert sorted(p.name for p in out.iterdir()) == ["0.latents.safetensors", "1.json", "1.mp4"]


def test_ctrl_c_keeps_finished_clips_and_leaves_no_partial_one(
    generate, tmp_path, monkeypatch
) -> None:
    decode = pipeline.decode
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        chunks = decode(*arguments)
        yield next(chunks)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from chunks

    monkeypatch.setattr(pipeline, "decode", interrupted)
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 130
    assert "interrupted" in ended.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.json", "0.mp4"]
