# SPDX-License-Identifier: Apache-2.0
"""`pw gallery` and `pw finish`: drafts to choose from, and a clip that a direct run would make."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.cli.gallery import _finishing
from pw_runtime.errors import BadRequest
from pw_runtime.job.drafts import numbered_drafts, read_drafts
from pw_runtime.presets import PRESETS
from pw_runtime.prompts import make_prompts
from pw_runtime.system.tensor_file import TensorFile
from pw_runtime.system.video_input import video_frames
from tests.convert.loras import random_pairs, tensors_in, write_lora
from tests.e2e.pw import Ended, Pw
from tests.inputs.videos import shades, write_video

TEXTS = ("a cat", "a dog on a hill")


@pytest.fixture
def gallery(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Make drafts of two prompts in `drafts`."""

    def run(*arguments: object) -> Ended:
        prompts = [word for text in TEXTS for word in ("--prompt", text)]
        return pw(
            "gallery", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "drafts",
            "--seed", "7", "--count", "2", *prompts, *arguments,
        )  # fmt: skip

    return run


def test_draft_n_has_the_position_of_a_file_with_the_prompts_repeated() -> None:
    prompts = make_prompts([("x", "a"), ("y", "b"), ("z", "c")])
    drafts = numbered_drafts(prompts, 2)
    assert [(x.id, x.position) for x in drafts] == [
        ("x-1", 1), ("x-2", 4), ("y-1", 2), ("y-2", 5), ("z-1", 3), ("z-2", 6),
    ]  # fmt: skip
    assert {x for x in drafts if x.id.endswith("-1")} == {
        replace(prompt, id=f"{prompt.id}-1") for prompt in prompts
    }
    more = numbered_drafts(prompts, 5)
    assert set(drafts) < set(more)  # those that there are stay
    with pytest.raises(BadRequest, match="cannot name a file"):
        numbered_drafts(make_prompts([("x" * 199, "a")]), 1)


def test_a_finished_draft_is_the_clip_of_a_direct_run_bit_for_bit(
    gallery: Callable[..., Ended], pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    ended = gallery()
    assert ended.code == 0, ended.err
    drafts = tmp_path / "drafts"
    assert [Path(line).name for line in ended.out.split()] == [
        "0-1.mp4", "0-2.mp4", "1-1.mp4", "1-2.mp4",
    ]  # fmt: skip
    command = f"pw finish 1-2 --drafts {drafts} --model {bundle_dir}"
    assert command in ended.err
    finished = pw(*command.split()[1:], "--save-latents")
    assert finished.code == 0, finished.err
    assert finished.out.split() == [str(drafts / "finished" / "1-2.mp4")]

    lines = [{"id": f"{i}-{n}", "text": text} for n in (1, 2) for i, text in enumerate(TEXTS)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    direct = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "direct",
        "--prompts", tmp_path / "p.jsonl", "--seed", "7", "--save-latents",
    )  # fmt: skip
    assert direct.code == 0, direct.err
    names = ("1-2.mp4", "1-2.latents.safetensors")
    (video, latents), (ours, found) = (
        [folder / name for name in names] for folder in (tmp_path / "direct", drafts / "finished")
    )
    assert video.read_bytes() == ours.read_bytes()
    wanted, tensors = TensorFile(latents).tensors(), TensorFile(found).tensors()
    assert wanted.keys() == tensors.keys()
    assert all(wanted[name].equal(tensors[name]) for name in wanted)
    notices = json.loads((drafts / "finished" / "1-2.json").read_text())["notices"]
    assert any("the draft is that of 1-2.latents.safetensors" in text for text in notices)


def test_a_gallery_goes_on_and_shows_all_drafts_that_there_are(
    gallery: Callable[..., Ended], tmp_path: Path
) -> None:
    assert gallery().code == 0
    drafts = tmp_path / "drafts"
    before = (drafts / "0-2.mp4").read_bytes()
    with Image.open(drafts / "gallery.png") as sheet:
        height = sheet.height
    more = gallery("--count", "3")
    assert more.code == 0, more.err
    assert "prompt 0-2: skipped" in more.err
    assert (drafts / "0-2.mp4").read_bytes() == before
    with Image.open(drafts / "gallery.png") as sheet:
        assert sheet.height > height
    assert "finish 1-3 --drafts" in more.err


def test_a_gallery_tells_programs_what_it_made(
    gallery: Callable[..., Ended], tmp_path: Path
) -> None:
    document = json.loads(gallery("--json").out)
    assert [clip["id"] for clip in document["clips"]] == ["0-1", "0-2", "1-1", "1-2"]
    assert [clip["seeds"]["draft"] for clip in document["clips"]] == [107, 307, 207, 407]


def test_drafts_without_a_high_res_stage_are_finished_at_a_preset_that_is_named(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.toml"
    text = preset.read_text()
    alone.write_text(text[: text.index("[highres]")] + text[text.index("[video]") :])
    made = pw(
        "gallery", "--model", bundle_dir, "--preset", alone, "--out", tmp_path, "--count", "1",
        "--prompt", "a cat",
    )  # fmt: skip
    assert "--preset FILE.toml" in made.err
    assert _finishing(PRESETS["draft"]) == ["2k"]
    shorter = replace(PRESETS["draft"].video, frames=49)
    assert _finishing(replace(PRESETS["draft"], video=shorter)) == ["2k", "--frames", "49"]
    finish = ("finish", "0-1", "--drafts", tmp_path, "--model", bundle_dir)
    refused = pw(*finish)
    assert refused.code == 2
    assert "has no high-res stage" in refused.err
    other = pw(*finish, "--preset", preset, "--set", "draft.steps=3")
    assert "preset.draft.steps is 2, wanted 3" in other.err
    assert pw(*finish, "--preset", preset).code == 0


def test_a_sheet_of_other_drafts_or_a_source_is_not_replaced(
    gallery: Callable[..., Ended], tmp_path: Path
) -> None:
    assert gallery().code == 0
    sheet = tmp_path / "drafts" / "gallery.png"
    content = sheet.read_bytes()
    others = gallery("--prompt", "a third prompt", "--count", "1")
    assert others.code == 2
    assert "would show the drafts of this run alone" in others.err
    assert "0-2, 1-2" in others.err
    source = gallery("--image", sheet)
    assert source.code == 2
    assert "which drafts start from" in source.err
    assert sheet.read_bytes() == content
    assert gallery("--count", "3").code == 0  # of the same prompts: those that there are, and more
    assert sheet.read_bytes() != content


def test_the_command_that_is_told_finishes_an_id_that_begins_with_a_dash(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "-x", "text": "a cat"}')
    made = pw(
        "gallery", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "drafts",
        "--prompts", prompts, "--count", "1",
    )  # fmt: skip
    (told,) = [line for line in made.err.splitlines() if "pw finish" in line]
    assert pw(*shlex.split(told)[1:]).code == 0
    assert (tmp_path / "drafts" / "finished" / "-x-1.mp4").exists()


def test_a_draft_may_be_named_by_its_file(gallery: Callable[..., Ended], tmp_path: Path) -> None:
    assert gallery().code == 0
    drafts = tmp_path / "drafts"
    name = "0-1.latents.safetensors"
    by_id, by_name, by_path = (
        read_drafts([given], folder)
        for given, folder in (("0-1", drafts), (name, drafts), (str(drafts / name), None))
    )
    assert by_id == by_name == by_path
    with pytest.raises(BadRequest, match=r"is not in the folder of --drafts"):
        read_drafts([f"elsewhere/{name}"], drafts)


def test_what_cannot_be_finished_is_refused(
    gallery: Callable[..., Ended], pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    assert gallery().code == 0
    drafts = tmp_path / "drafts"

    def refusal(*arguments: object) -> str:
        ended = pw("finish", *arguments, "--model", bundle_dir)
        assert ended.code == 2
        return ended.err

    assert "one of 0-1, 0-2, 1-1, 1-2" in refusal("0-3", "--drafts", drafts)
    assert "no folder is named" in refusal("0-1")
    assert "--size changes a preset" in refusal("0-1", "--drafts", drafts, "--size", "64x64")
    latents = "0-1.latents.safetensors"
    (drafts / latents).rename(drafts / "mine.latents.safetensors")
    assert "has another name" in refusal(drafts / "mine.latents.safetensors")
    (drafts / "mine.latents.safetensors").rename(drafts / latents)
    other = pw(
        "gallery", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "b", "--seed",
        "8", "--count", "1", "--prompt", "a cat",
    )  # fmt: skip
    assert other.code == 0, other.err
    (tmp_path / "b" / latents).rename(drafts / latents)
    with pytest.raises(BadRequest, match="different runs") as refused:
        read_drafts(["0-1", "0-2"], drafts)
    assert "another base seed" in str(refused.value.got)


def test_a_draft_with_a_lora_and_a_picture_is_finished_by_the_command_that_is_told(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    picture, lora = tmp_path / "first.png", tmp_path / "style.safetensors"
    Image.new("RGB", (96, 48), (200, 40, 40)).save(picture)
    write_lora(lora, tensors_in("ComfyUI", random_pairs(open_bundle(bundle_dir))))
    common = ("--model", bundle_dir, "--lora", f"{lora}:0.7")
    asked = (*common, "--preset", preset, "--prompt", "a cat", "--image", picture)
    made = pw("gallery", *asked, "--out", tmp_path / "drafts", "--count", "1")
    assert made.code == 0, made.err
    (command,) = [line.split() for line in made.err.splitlines() if "pw finish" in line]
    without = [word for word in command[1:] if word not in ("--lora", f"{lora}:0.7")]
    refused = pw(*without)
    assert refused.code == 2
    assert "is the draft of another clip" in refused.err
    finished = pw(*command[1:], "--image-highres")
    assert finished.code == 0, finished.err

    (tmp_path / "p.jsonl").write_text(
        json.dumps({"id": "0-1", "text": "a cat", "image": str(picture)})
    )
    direct = pw(
        "generate", *common, "--preset", preset, "--prompts", tmp_path / "p.jsonl",
        "--out", tmp_path / "direct", "--image-highres",
    )  # fmt: skip
    assert direct.code == 0, direct.err
    ours, theirs = (tmp_path / x / "0-1.mp4" for x in ("drafts/finished", "direct"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_drafts_that_began_with_a_video_are_finished_as_a_direct_run_would(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    """Seen: the command that `pw gallery` told was refused."""
    video = write_video(tmp_path / "walk.mp4", shades(24))
    asked = ("--model", bundle_dir, "--preset", preset, "--prompt", "a cat", "--draft-video", video)
    same = pw("gallery", *asked, "--out", tmp_path / "drafts")
    assert same.code == 2
    assert "every draft would be the same" in same.err
    asked = (*asked, "--draft-strength", "0.9")
    made = pw("gallery", *asked, "--out", tmp_path / "drafts", "--count", "2")
    assert made.code == 0, made.err
    command = next(line.split() for line in made.err.splitlines() if "pw finish 0-1" in line)
    finished = pw(*command[1:])
    assert finished.code == 0, finished.err
    direct = pw("generate", *asked, "--out", tmp_path / "direct")
    assert direct.code == 0, direct.err
    ours, theirs = tmp_path / "drafts" / "finished" / "0-1.mp4", tmp_path / "direct" / "0.mp4"
    assert _pixels(ours) == _pixels(theirs)


def _pixels(video: Path) -> list[bytes]:
    return [frame.to_ndarray(format="yuv420p").tobytes() for frame in video_frames(video)]


@pytest.mark.parametrize("option", [("--conv", "onednn"), ("--vae-precision", "bf16")])
def test_drafts_that_start_from_a_picture_are_finished_with_the_convolutions_of_its_encoder(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    """Seen: the command that `pw gallery` told was refused, on a CPU."""
    picture = tmp_path / "first.png"
    Image.new("RGB", (96, 48), (200, 40, 40)).save(picture)
    made = pw(
        "gallery", "--model", bundle_dir, "--preset", preset, "--prompt", "a cat", "--device",
        "cpu", "--image", picture, "--count", "1", "--out", tmp_path / "drafts", *option,
    )  # fmt: skip
    assert made.code == 0, made.err
    (command,) = [line.split() for line in made.err.splitlines() if "pw finish" in line]
    finished = pw(*command[1:])
    assert finished.code == 0, finished.err
    receipt = json.loads((tmp_path / "drafts" / "finished" / "0-1.json").read_text())
    assert receipt["options"]["conv"] == "onednn"
