# SPDX-License-Identifier: Apache-2.0
"""Bad input and faults: one clear error, the right exit code, nothing lost, nothing broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_runtime import pipeline
from pw_runtime.checkpoint import loader
from pw_runtime.checkpoint.bundle import load_tensors, open_bundle
from pw_runtime.checkpoint.loader import check_networks, load_text_network
from pw_runtime.errors import BadRequest, BadWeights, WriteFailed
from pw_runtime.job.checks import check_request
from pw_runtime.presets import PRESETS
from pw_runtime.stages.text import encode_text
from pw_runtime.types import Prompt, Request, RunOptions
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
    assert "--prompts FILE and --prompt TEXT" in ended.err


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


@pytest.mark.parametrize("bad", [torch.tensor(float("nan")), torch.tensor(1)])
def test_noise_that_is_not_finite_or_not_float(generate, tmp_path, bad) -> None:
    noise = {name: torch.zeros(*shape) + bad for name, shape in latent_shapes().items()}
    noise["draft_noise"] = noise["draft_noise"].to(bad.dtype)
    save_file(noise, tmp_path / "noise.safetensors")
    ended = generate("--prompt", "cat", "--noise", tmp_path / "noise.safetensors")
    assert ended.code == 2
    assert "no usable noise" in ended.err


def test_one_noise_file_for_several_prompts_is_said(generate, tmp_path) -> None:
    noise = {name: torch.randn(*shape) for name, shape in latent_shapes().items()}
    save_file(noise, tmp_path / "noise.safetensors")
    ended = generate(
        "--prompt", "a", "--prompt", "b", "--noise", tmp_path / "noise.safetensors",
        "--draft-only", "--quiet",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.err.count("every prompt of this run starts from the noise") == 1
    assert "starts from the noise" in (tmp_path / "out" / "1.json").read_text()


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


def test_kernels_without_a_gpu_are_refused(generate) -> None:
    ended = generate("--prompt", "cat", "--kernels", "triton", "--device", "cpu")
    assert ended.code == 2
    assert "CUDA device" in ended.err


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
    encoded_video = pipeline.encoded_video

    def full_disk(chunks, path, **arguments):
        if path.name == "0.mp4":
            raise WriteFailed(f"cannot write {path}", got="No space left on device")
        return encoded_video(chunks, path, **arguments)

    monkeypatch.setattr(pipeline, "encoded_video", full_disk)
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    out = tmp_path / "out"
    assert ended.code == 3
    assert "No space left" in ended.err
    assert "1 of 2 prompts failed: 0" in ended.err
    assert ended.out.split() == [str(out / "1.mp4")]
    assert sorted(p.name for p in out.iterdir()) == ["0.latents.safetensors", "1.json", "1.mp4"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_is_one_clear_error(generate, monkeypatch, error) -> None:
    def run_out(*arguments):
        raise error

    monkeypatch.setattr(pipeline, "denoise_highres", run_out)
    ended = generate("--prompt", "a cat")
    assert ended.code == 3
    assert "out of memory" in ended.err
    assert "do this" in ended.err
    assert "Traceback" not in ended.err


BAD_TENSORS = {
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "draft": "blocks.0.ffn.0.weight",
    "highres": "spatial_adapter.backbone.0.weight",
    "vae": "decoder.conv1.weight",
}


@pytest.mark.parametrize("network", BAD_TENSORS)
def test_weights_that_are_not_finite_are_named_at_the_first_step_and_stop_the_batch(
    generate, tmp_path, monkeypatch, network
) -> None:
    """Seen: every prompt failed after all its steps, and nobody said why."""

    def with_nan(bundle, wanted, **options):
        tensors = load_tensors(bundle, wanted, **options)
        if wanted == network and BAD_TENSORS[network] in tensors:
            tensors[BAD_TENSORS[network]] = torch.full_like(
                tensors[BAD_TENSORS[network]], float("nan")
            )
        return tensors

    monkeypatch.setattr(loader, "load_tensors", with_nan)
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 2
    assert ended.err.count("error: the model's weights contain NaN or infinity") == 1
    assert f"got: {BAD_TENSORS[network]}" in ended.err
    assert "Traceback" not in ended.err
    latents = sorted(path.name for path in (tmp_path / "out").iterdir())
    kept = [] if network == "text_encoder" else ["0", "1"]
    assert latents == [f"{name}.latents.safetensors" for name in kept]


def test_values_that_overflow_fail_their_prompt_alone(generate, tmp_path, monkeypatch) -> None:
    def huge(net, text, text_len, notice):
        context = encode_text(net, text, text_len, notice)
        return context * 1e38 if text == "a cat" else context

    monkeypatch.setattr(pipeline, "encode_text", huge)
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 3
    assert "prompt 0 failed: the velocity of step 1 contains NaN or infinity" in ended.err
    assert ended.out.split() == [str(tmp_path / "out" / "1.mp4")]


def test_a_contact_sheet_that_fails_hides_no_finished_clip(generate, tmp_path, monkeypatch) -> None:
    """Seen: exit 2 and no path, with the clip complete on the disk."""

    def fails(rows, path):
        raise WriteFailed(f"cannot write {path}")

    monkeypatch.setattr("pw_runtime.job.run.write_contact_sheet", fails)
    ended = generate("--prompt", "a cat", "--contact-sheet", "--draft-only", "--overwrite")
    assert ended.code == 3
    assert ended.out.split() == [str(tmp_path / "out" / "0.mp4")]
    assert "contact_sheet.png" in ended.err


def test_a_folder_in_the_place_of_a_file_is_found_before_anything_is_computed(
    generate, tmp_path
) -> None:
    for name in ("contact_sheet.png", "0.mp4", "0.json"):
        (tmp_path / "out" / name).mkdir(parents=True)
        ended = generate("--prompt", "a cat", "--contact-sheet", "--draft-only", "--overwrite")
        assert ended.code == 2
        assert f"{name}\n  got: a folder" in ended.err
        (tmp_path / "out" / name).rmdir()


def test_networks_that_do_not_fit_are_found_before_anything_is_computed(
    generate, bundle_dir, tmp_path
) -> None:
    """Seen: a wrong high-res config came to light after all drafts were made."""
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_dir, damaged)
    manifest = json.loads((damaged / "bundle.json").read_text())
    manifest["networks"]["highres"]["config"]["control_blocks"] = [2]
    (damaged / "bundle.json").write_text(json.dumps(manifest))
    ended = generate("--prompt", "cat", "--model", damaged)
    assert ended.code == 2
    assert "zero_layers.2" in ended.err
    assert "draft 0" not in ended.err


def test_empty_path_is_refused(generate) -> None:
    ended = generate("--prompt", "cat", "--out", "")
    assert ended.code == 2
    assert "the path is empty" in ended.err


def test_ctrl_c_keeps_finished_clips_and_leaves_no_partial_one(
    generate, tmp_path, monkeypatch
) -> None:
    decode = pipeline.decode_frames
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        chunks = decode(*arguments, **options)
        yield next(chunks)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from chunks

    monkeypatch.setattr(pipeline, "decode_frames", interrupted)
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 130
    assert "interrupted" in ended.err
    left = tmp_path / "out" / "1.latents.safetensors"
    assert f"the latents of 1 are kept in {left}" in ended.err
    assert f"pw decode {left} --model" in ended.err
    assert sorted(tmp_path.glob("out/*")) == [
        tmp_path / "out" / "0.json", tmp_path / "out" / "0.mp4", left
    ]  # fmt: skip


def test_what_the_triton_kernels_cannot_take_is_refused_before_anything_is_computed(
    bundle_dir,
) -> None:
    """The test model has 32-wide heads; the rest of the check needs no GPU either."""
    bundle = open_bundle(bundle_dir)
    with pytest.raises(BadRequest, match="does not support the draft network"):
        check_networks(bundle, ["draft"], "triton")
    request = Request(
        prompts=(Prompt("a cat"),),
        preset=PRESETS["draft"],
        out=Path(),
        options=RunOptions(kernels="triton", device="cuda", precision="fp32"),
    )
    with pytest.raises(BadRequest, match="computes in bf16"):
        check_request(request)


def test_damaged_tokenizer_is_one_clear_error(bundle_dir, tmp_path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_dir, damaged)
    (damaged / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        BadWeights, match=r"tokenizer\.json has the wrong size[\s\S]*do this: copy the bundle"
    ):
        load_text_network(open_bundle(damaged), "fp32", torch.device("cpu"))


def test_version_is_told_from_a_source_checkout_too(pw) -> None:
    ended = pw("--version")
    assert ended.code == 0
    assert ended.out.startswith("pw, version ")
