# SPDX-License-Identifier: Apache-2.0
"""`pw repro`: a clip again from its receipt, how far it is, and what explains that."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadRequest
from pw_runtime.job import conv_choice
from pw_runtime.job.recorded import read_recorded
from pw_runtime.job.repeat import Difference, Level, can_explain, differences, repeat_request
from pw_runtime.pipeline import generate
from pw_runtime.presets import find_preset
from pw_runtime.prompts import make_prompts
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Request, RunOptions
from tests.e2e.pw import Ended, Pw, write_preset


@pytest.fixture(scope="module")
def made(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the second of two clips, its receipt and latents."""
    folder = tmp_path_factory.mktemp("made")
    request = Request(
        prompts=make_prompts([("a", "a cat"), ("b", "a dog")])[1:],
        preset=find_preset(str(write_preset(folder / "small.toml"))),
        out=folder / "clips",
        negative="blur",
        seed=11,
        options=RunOptions(save_latents=True, device="cpu"),
    )
    (outcome,) = generate(request, open_bundle(bundle_dir), Reporter(quiet=True))
    assert outcome.error is None
    return folder / "clips"


@pytest.fixture
def clips(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "clips"))


@pytest.fixture
def repro(pw: Pw, bundle_dir: Path, clips: Path):
    def run(*arguments: object) -> Ended:
        return pw("repro", clips / "b.json", "--model", bundle_dir, "--quiet", *arguments)

    return run


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def keep_only_the_receipt(clips: Path) -> None:
    for name in ("b.mp4", "b.latents.safetensors"):
        (clips / name).unlink()


def test_a_clip_is_made_again_byte_for_byte(repro) -> None:
    ended = repro()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "video: the same file, byte for byte",
        "draft latent: every bit is the same",
        "highres latent: every bit is the same",
    ]


def test_a_receipt_alone_is_enough(repro, clips: Path) -> None:
    keep_only_the_receipt(clips)
    ended = repro()
    assert ended.code == 0
    assert ended.out.startswith("video: the same file, byte for byte\nlatents: the original's")


def test_what_the_machine_lacks_explains_the_distance(
    repro, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_choice, "open_cpu_kernels", lambda say: "no compiler")
    ended = repro("--json", "--out", tmp_path / "again")
    assert ended.code == 3
    report = json.loads(ended.out)
    assert report["reproduced"] is False
    assert report["latents"] == {"draft_latent": 0, "highres_latent": 0}
    assert report["psnr"] > 40
    assert report["max_difference"] > 0  # h264 makes more of a rounding here and there
    assert report["explained_by"] == [{"name": "options.conv", "then": "winograd", "now": "onednn"}]
    assert report["unrecorded"] == []
    assert Path(report["video"]).read_bytes() != (clips / "b.mp4").read_bytes()
    assert repro("--out", tmp_path / "again").code == 3, "made anew, where an attempt is"


def test_a_receipt_that_is_not_true_is_found_out(repro, clips: Path) -> None:
    edit(clips / "b.json", lambda receipt: receipt.update(negative="noise"))
    ended = repro()
    assert ended.code == 3
    assert "dB PSNR" in ended.out
    assert "highres latent: relative L2 " in ended.out
    assert "nothing that is recorded explains it" in ended.out


def as_older(receipt: dict[str, Any]) -> None:
    """What the first versions wrote."""
    for name in ("latents", "tiling", "machine", "exactness", "passes", "fallbacks"):
        receipt.pop(name)
    del receipt["video"]["sha256"]
    for name in ("linear", "sparse_attention", "step_cache", "guidance_reuse", "blocks"):
        receipt["options"].pop(name)
    del receipt["preset"]["decode"]["order"]
    receipt["preset"]["decode"]["caches"] = "host"
    receipt["format"] = 1


def test_an_older_receipt_works_and_says_what_is_unknown(repro, clips: Path) -> None:
    edit(clips / "b.json", as_older)
    ended = repro()
    assert ended.code == 0
    assert "video: the same file" in ended.out, "the file itself is there"
    assert "its receipt does not have: machine, tiling" in ended.out
    assert "options." not in ended.out, "they did not exist"


def test_the_metadata_explain_other_bytes_of_the_same_pixels(repro, clips: Path) -> None:
    edit(clips / "b.json", as_older)
    content = (clips / "b.mp4").read_bytes()
    (clips / "b.mp4").write_bytes(content.replace(b"a dog", b"a hog"))
    ended = repro()
    assert ended.code == 0
    assert "every pixel is the same; the file has other bytes" in ended.out
    assert "  video.metadata: none then, title, description, comment now" in ended.out


def test_without_the_original_another_digest_is_all_that_is_known(repro, clips: Path) -> None:
    keep_only_the_receipt(clips)
    edit(clips / "b.json", lambda receipt: receipt["video"].update(sha256="0" * 64))
    ended = repro()
    assert ended.code == 3
    assert "other bytes; the original is not here" in ended.out


def test_nothing_left_to_compare_with_is_an_error_before_the_run(repro, clips: Path) -> None:
    keep_only_the_receipt(clips)
    edit(clips / "b.json", as_older)
    ended = repro()
    assert ended.code == 2
    assert "nothing is left of the clip" in ended.err


def test_noise_is_found_by_its_digest(
    pw: Pw, repro, clips: Path, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    noise, other = tmp_path / "noise.safetensors", tmp_path / "other.safetensors"
    latents = (clips / "b.latents.safetensors").replace(noise)
    shutil.rmtree(clips)
    generate = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a fox")
    assert pw(*generate, "--out", tmp_path / "x", "--save-latents").code == 0
    (tmp_path / "x" / "0.latents.safetensors").rename(other)
    assert pw(*generate, "--out", clips, "--noise", noise).code == 0
    for name in ("0.mp4", "0.json"):
        (clips / name).rename(clips / name.replace("0.", "b."))
    edit(clips / "b.json", lambda receipt: receipt["video"].update(file="b.mp4"))
    assert repro().code == 0, "it is where the receipt says"
    moved = latents.rename(tmp_path / "moved.safetensors")
    for arguments in ((), ("--noise", other)):
        ended = repro(*arguments)
        assert ended.code == 2
        assert "the noise that " in ended.err
        assert "SHA-256 draft " in ended.err
    assert repro("--noise", moved).code == 0


def on_a_gpu(receipt: dict[str, Any]) -> None:
    receipt["options"].update(device="cuda:7", kernels="triton", attention="cudnn")
    receipt["machine"]["gpu"] = "NVIDIA H200"


def test_a_clip_of_a_gpu_starts_from_its_noise_or_not_at_all(repro, clips: Path) -> None:
    edit(clips / "b.json", on_a_gpu)
    ended = repro()
    assert ended.code == 0, "the noise is in the latents file"
    assert "without effect here:\n" in ended.out
    assert "options.device: cuda:7 then, cpu now" in ended.out
    assert "machine.gpu: NVIDIA H200 then, nothing now" in ended.out
    (clips / "b.latents.safetensors").unlink()
    ended = repro()
    assert ended.code == 2
    assert "seeds draw other numbers on another kind of device" in ended.err


def test_a_clip_that_was_finished_from_latents_is_made_again_as_it_was_finished(
    pw: Pw, repro, clips: Path, bundle_dir: Path
) -> None:
    latents = clips / "b.latents.safetensors"
    for name in ("b.json", "b.mp4"):
        (clips / name).unlink()
    assert pw("decode", latents, "--model", bundle_dir, "--codec", "ffv1").code == 0
    ended = repro()
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "video: the same file, byte for byte",
        "draft latent: every bit is the same",
        "highres latent: every bit is the same",
        "its receipt does not have: kernel_launches",
    ]


def test_what_cannot_be_repeated_is_refused(
    pw: Pw, repro, clips: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    assert "is the folder of the original" in repro("--out", clips).err
    other = Path(shutil.copytree(bundle_dir, tmp_path / "other"))
    edit(other / "bundle.json", lambda x: x)
    ended = pw("repro", clips / "b.json", "--model", other)
    assert ended.code == 2
    assert "was made with another bundle" in ended.err
    edit(clips / "b.json", lambda receipt: receipt["preset"]["draft"].update(width=97))
    assert "asks for a clip that cannot be made" in repro().err
    assert pw("repro", clips / "none.json", "--model", bundle_dir).code == 2


ODD = (None, -1, 1e308, "", "../x", "\0", [], {}, True, [[1]], {"a": {"b": 1}}, 2**70, "é🦊")


def test_any_change_of_a_receipt_is_taken_or_refused_in_words(clips: Path, tmp_path: Path) -> None:
    receipt = json.loads((clips / "b.json").read_text())
    draw, refused = random.Random(0), 0
    for _ in range(400):
        changed = json.loads(json.dumps(receipt))
        table, key = changed, draw.choice(list(changed))
        while isinstance(table[key], dict) and table[key] and draw.random() < 0.7:
            table, key = table[key], draw.choice(list(table[key]))
        table[key] = draw.choice(ODD)
        if draw.random() < 0.1:
            del table[key]
        (clips / "b.json").write_text(json.dumps(changed))
        try:
            recorded = read_recorded(clips / "b.json")
            repeat_request(recorded, clips / "b.json", tmp_path / "out")
            differences(recorded.receipt, receipt)
        except BadRequest:
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("versions.av", {"file", "frames", "unknown"}),
        ("tiling.strips", {"frames", "unknown"}),
        ("decode.machine.threads", {"frames", "unknown"}),
        ("noise.draft", {"latents", "unknown"}),
        ("options.linear", {"latents", "unknown"}),
        ("sources.conv", {"latents", "unknown"}),
        ("machine.threads", {"latents", "frames", "unknown"}),
        ("versions.torch", {"latents", "frames", "unknown"}),
    ],
)
def test_only_what_comes_before_the_first_difference_explains_it(
    name: str, levels: set[Level]
) -> None:
    difference = Difference(name=name, then=1, now=2)
    every: tuple[Level, ...] = ("latents", "frames", "file", "unknown")
    assert {level for level in every if can_explain(difference, level)} == levels


def test_a_clip_in_place_of_its_receipt_is_told_so(pw: Pw, clips: Path, bundle_dir: Path) -> None:
    """Seen: the advice to remove the clip."""
    for path in (clips / "b.mp4", clips / "none.json"):
        ended = pw("repro", path, "--model", bundle_dir)
        assert ended.code == 2
        assert "give the receipt of a clip" in ended.err
        assert "remove" not in ended.err
