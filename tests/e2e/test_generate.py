# SPDX-License-Identifier: Apache-2.0
"""What `pw generate` leaves on the disk and says."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from pw_runtime.sampling.noise import draw_noise, seeds_for, tensor_digest
from tests.e2e.pw import Pw, write_preset
from tests.oracle.checkpoint import Checkpoint


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [{"id": "cat", "text": "a cat"}, {"prompt_id": 7, "caption": "a red ball"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    return file


def test_every_prompt_gets_a_clip_and_a_receipt(
    pw: Pw, bundle_dir: Path, preset: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = pw(
        "generate", "--model", bundle_dir, "--prompts", prompts, "--preset", preset,
        "--seed", 5, "--out", out, "--contact-sheet",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(out / "cat.mp4"), str(out / "7.mp4")]
    assert sorted(p.name for p in out.iterdir()) == [
        "7.json", "7.mp4", "cat.json", "cat.mp4", "contact_sheet.png",
    ]  # fmt: skip
    with av.open(str(out / "7.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (192, 96, 5)
        assert stream.average_rate == 24

    receipt = json.loads((out / "7.json").read_text())
    assert receipt["prompt"] == {"id": "7", "text": "a red ball", "position": 2}
    # Official rule: draft base + 100 k, high-res base + 100 (k - 1) + 10000.
    assert receipt["seeds"] == {"base": 5, "draft": 205, "highres": 10105}
    shape = (48, 2, 4, 6)
    noise = draw_noise(shape, 205, torch.device("cpu"))
    assert receipt["noise"]["draft"] == tensor_digest(noise)
    stages = {"text", "draft", "condition", "highres", "decode", "write", "load_all_networks"}
    assert stages <= receipt["seconds"].keys()
    assert receipt["peak_memory_bytes"]["host"] > 0
    assert receipt["bundle"]["digest"]
    assert receipt["options"]["precision"] == "fp32"
    assert receipt["options"]["kernels"] == "reference"
    assert receipt["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("guidance", "context", "said"),
    [
        (1.0, "text_context", "one pass per step, with the prompt (guidance 1)"),
        (0.0, "negative_context", "one pass per step, with the negative prompt (guidance 0)"),
    ],
)
def test_guidance_that_needs_one_pass_runs_one(
    pw: Pw, bundle_dir: Path, tmp_path: Path, guidance: float, context: str, said: str
) -> None:
    """Seen: the other text was encoded, and its pass run and multiplied by zero."""
    preset = write_preset(
        tmp_path / "preset.toml", draft_guidance=guidance, highres_guidance=guidance
    )
    out = tmp_path / "out"
    ended = pw(
        "generate", "--model", bundle_dir, "--prompt", "a cat", "--preset", preset,
        "--out", out, "--save-latents",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.err.count(said) == 2  # both stages
    contexts = {name for name in load_file(out / "0.latents.safetensors") if "context" in name}
    assert contexts == {context}
    receipt = json.loads((out / "0.json").read_text())
    pass_name = "cond" if guidance else "uncond"
    assert receipt["passes"] == {"draft": [pass_name], "highres": [pass_name]}


def test_draft_only_stops_before_the_highres_network(
    pw: Pw, checkpoint: Checkpoint, preset: Path, tmp_path: Path
) -> None:
    """It also works with a bundle that has no high-res network at all."""
    bundle, out = tmp_path / "draft-bundle", tmp_path / "out"
    assert pw("convert", "--wan", checkpoint.base, "--out", bundle, "--quiet").code == 0
    common = ("generate", "--model", bundle, "--prompt", "cat", "--preset", preset, "--out", out)
    refused = pw(*common)
    assert refused.code == 2
    assert "--highres" in refused.err
    made = pw(*common, "--draft-only", "--save-latents")
    assert made.code == 0, made.err
    assert set(load_file(out / "0.latents.safetensors")) == {
        "text_context", "negative_context", "draft_noise", "draft_latent",
    }  # fmt: skip
    with av.open(str(out / "0.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].frames) == (96, 5)


def test_official_flags_are_understood(
    pw: Pw, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Path
) -> None:
    """The checkpoint is converted once; the second run finds the bundle again."""
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    arguments = (
        "generate", "--ckpt_dir", checkpoint.base, "--lr_ckpt", checkpoint.draft,
        "--hr_ckpt", checkpoint.highres, "--prompt_file", prompts, "--resolution", preset,
        "--video_dir", tmp_path / "videos", "--base_seed", 3,
    )  # fmt: skip
    first = pw(*arguments)
    assert first.code == 0, first.err
    assert "converting" in first.err
    assert json.loads((tmp_path / "videos" / "0.json").read_text())["seeds"]["base"] == 3
    second = pw(*arguments, "--overwrite")
    assert second.code == 0, second.err
    assert "by an earlier run" in second.err


def test_bf16_changes_the_numbers_and_is_in_the_receipt(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    latents = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        ended = pw(
            "generate", "--model", bundle_dir, "--prompt", "cat", "--preset", preset,
            "--out", out, "--save-latents", "--precision", precision,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        assert json.loads((out / "0.json").read_text())["options"]["precision"] == precision
        latents[precision] = load_file(out / "0.latents.safetensors")["draft_latent"]
    error = (latents["bf16"] - latents["fp32"]).norm() / latents["fp32"].norm()
    assert 1e-4 < error < 0.2


def test_text_that_is_too_long_is_cut_and_said_once(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--prompt", "cat " * 300, "--preset", preset,
        "--out", tmp_path / "out", "--negative", "bad", "--draft-only", "--quiet",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.err.count("text truncated from") == 1
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert len(receipt["notices"]) == 1


def test_quiet_says_nothing(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--prompt", "cat", "--preset", preset,
        "--out", tmp_path / "out", "--negative", "bad", "--quiet",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.err == ""


def test_stages_are_told_as_plain_lines_off_a_terminal(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--prompt", "cat", "--preset", preset,
        "--out", tmp_path / "out",
    )  # fmt: skip
    lines = ended.err.splitlines()
    for start in ("text: 1/1", "draft 0: 2/2", "highres 0: 2/2", "decode 0: 5/5"):
        assert any(line.startswith(start) for line in lines), ended.err
    assert "\x1b" not in ended.err


def test_doctor_lists_the_operations_and_what_runs(pw: Pw) -> None:
    ended = pw("doctor", "--kernels")
    assert ended.code == 0
    others = "triton, gluon, cudnn, flash, flash-attn, flash-attn-4"
    assert f"attention            reference  {others}\n" in ended.out
    assert "merge_attention      reference\n" in ended.out
    assert "\nkernels: compiled " in ended.out  # by whom, and into what


def test_seeds_depend_on_the_position_alone() -> None:
    assert (seeds_for(0, 1).draft, seeds_for(0, 1).highres) == (100, 10_000)
    assert (seeds_for(3, 4).draft, seeds_for(3, 4).highres) == (403, 10_303)
