# SPDX-License-Identifier: Apache-2.0
"""Clips from a video in place of the draft: `--draft-video`, `--draft-strength`, `pw upscale`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open

from pw_runtime import pipeline
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.loader import load_encoder
from pw_runtime.job import networks as networks_module
from pw_runtime.job.checks import check_content
from pw_runtime.job.clip import options_of
from pw_runtime.presets import PRESETS
from pw_runtime.sampling.noise import draw_noise
from pw_runtime.sampling.schedule import make_schedule
from pw_runtime.system.sound_copy import find_sound, why_left_out
from pw_runtime.system.video_source import examine_video, video_chunks
from pw_runtime.types import Prompt, Request, RunOptions, VideoConfig
from tests.e2e.pw import Ended, Pw
from tests.inputs.videos import corners, shades, write_video

CLIP = VideoConfig(frames=5, fps=24)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A clip of 640 ms at 25 fps, of which the model's takes 5 frames at 24."""
    pictures = [np.roll(corners(120, 80), 4 * i, axis=1) for i in range(16)]
    return write_video(tmp_path / "walk.mp4", pictures, 25)


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path):
    def run(*arguments: object, out: str = "out") -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / out,
            "--codec", "ffv1", "--prompt", "a cat", "--save-latents", *arguments,
        )  # fmt: skip

    return run


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def encoded(bundle_dir: Path, video: Path) -> torch.Tensor:
    """The latent of a video: VaeEncoder.forward of all its frames."""
    source = examine_video(video, CLIP, 96, 64)
    frames = torch.cat(list(video_chunks(source, 96, 64)), dim=1)
    with torch.inference_mode():
        return load_encoder(open_bundle(bundle_dir), torch.device("cpu"))(frames)


def frames(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sounds(path: Path) -> list[bytes]:
    with av.open(path) as container:
        if not container.streams.audio:
            return []
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def test_at_strength_0_the_video_is_the_draft(
    generate, bundle_dir: Path, tmp_path: Path, video: Path, monkeypatch
) -> None:
    """Its latent bit for bit; no draft network is selected, loaded or planned, no noise drawn."""
    loaded = []
    load = networks_module.load_transformer
    monkeypatch.setattr(
        networks_module, "load_transformer", lambda *args: loaded.append(args[1]) or load(*args)
    )
    ended = generate("--draft-video", video, "--conv", "onednn")
    assert ended.code == 0, ended.err
    assert loaded == ["highres"]
    kept = tensors(tmp_path / "out" / "0.latents.safetensors")
    assert torch.equal(kept["draft_latent"], encoded(bundle_dir, video))
    assert "draft_noise" not in kept
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["noise"].keys() == {"highres"}
    assert receipt["passes"].keys() == {"highres"}
    assert receipt["plan"]["stages"].keys() == {"text", "encode", "highres", "decode"}
    assert "draft" not in receipt["engines"]
    assert receipt["sources"]["draft_video"]["file"] == "walk.mp4"
    assert any("walk.mp4: " in notice for notice in receipt["notices"])
    assert "encode 0: 2/2" in ended.err


@pytest.mark.parametrize(
    ("more", "planned"),
    [
        ([], ["text", "encode", "highres", "decode"]),
        (["--draft-strength", 0.9], ["text", "encode", "draft", "highres", "decode"]),
        (["--draft-only"], ["text", "encode", "decode"]),
    ],
)
def test_a_plan_is_that_of_the_run_with_the_video(
    pw: Pw, bundle_dir: Path, preset: Path, video: Path, more: list[object], planned: list[str]
) -> None:
    words = ("plan", "--model", bundle_dir, "--preset", preset, "--draft-video", video, "--json")
    ended = pw(*words, *more)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert [stage["stage"] for stage in told["stages"]] == planned
    timed = {stage["stage"] for stage in told["stages"] if stage["seconds"] is not None}
    assert timed == set(planned) - {"text", "encode"}


def test_a_plan_with_a_video_that_is_not_there_is_one_clear_error(pw: Pw, tmp_path: Path) -> None:
    ended = pw("plan", "--preset", "2k", "--draft-video", tmp_path / "gone.mp4")
    assert ended.code == 2
    assert f"cannot read {tmp_path / 'gone.mp4'}" in ended.err


def test_at_strength_1_nothing_of_the_video_is_left(generate, tmp_path: Path, video: Path) -> None:
    assert generate(out="plain").code == 0
    ended = generate("--draft-video", video, "--draft-strength", 1, out="video")
    assert ended.code == 0, ended.err
    assert "nothing is left of walk.mp4 at --draft-strength 1: it is not read" in ended.err
    plain, same = (tensors(tmp_path / x / "0.latents.safetensors") for x in ("plain", "video"))
    assert plain.keys() == same.keys()
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert (tmp_path / "plain/0.mkv").read_bytes() == (tmp_path / "video/0.mkv").read_bytes()


def test_between_the_draft_begins_with_video_and_noise(
    generate, bundle_dir: Path, tmp_path: Path, video: Path, monkeypatch
) -> None:
    """x = (1 - sigma) z + sigma noise, at the first sigma that is no larger than the strength."""
    begun = []
    denoise = pipeline.denoise_draft

    def watched(net, *args, **kwargs):
        def velocities(x, *inputs):
            begun.append(x.clone())
            return type(net).velocities(net, x, *inputs)

        monkeypatch.setattr(net, "velocities", velocities)
        return denoise(net, *args, **kwargs)

    monkeypatch.setattr(pipeline, "denoise_draft", watched)
    options = ("--set", "draft.steps=6", "--conv", "onednn")
    ended = generate("--draft-video", video, "--draft-strength", 0.9, *options)
    assert ended.code == 0, ended.err
    sigmas = make_schedule("unipc", 6, 5.0).sigmas
    first = next(i for i, sigma in enumerate(sigmas) if sigma <= 0.9)
    assert f"the draft begins with it at step {first + 1} of 6" in ended.err
    assert len(begun) == 6 - first
    assert f"draft 0: {6 - first}/{6 - first}" in ended.err
    noise = draw_noise((48, 2, 4, 6), 100, torch.device("cpu"))
    mixed = (1 - sigmas[first]) * encoded(bundle_dir, video) + sigmas[first] * noise
    assert torch.equal(begun[0], mixed)
    assert torch.equal(tensors(tmp_path / "out/0.latents.safetensors")["draft_noise"], noise)


def test_a_run_that_ended_goes_on_and_its_latents_make_the_same_clip(
    generate, pw: Pw, bundle_dir: Path, tmp_path: Path, video: Path, monkeypatch
) -> None:
    assert generate("--draft-video", video, out="whole").code == 0
    highres = pipeline.denoise_highres

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "denoise_highres", fails)
    assert generate("--draft-video", video).code != 0
    monkeypatch.setattr(pipeline, "denoise_highres", highres)
    monkeypatch.setattr(pipeline, "encode_video", fails)
    ended = generate("--draft-video", video)
    assert ended.code == 0, ended.err
    assert "going on at the highres stage" in ended.err
    clip = (tmp_path / "whole/0.mkv").read_bytes()
    assert (tmp_path / "out/0.mkv").read_bytes() == clip
    latents = tmp_path / "out/0.latents.safetensors"
    again = pw("decode", latents, "--model", bundle_dir, "--out", tmp_path / "decoded")
    assert again.code == 0, again.err
    assert (tmp_path / "decoded/0.mkv").read_bytes() == clip
    assert "skipped" in generate("--draft-video", video).err


def test_another_video_is_another_clip(generate, tmp_path: Path, video: Path) -> None:
    assert generate("--draft-video", video).code == 0
    copy = shutil.copy(video, tmp_path / "copy.mp4")
    assert "skipped" in generate("--draft-video", copy).err, "names and folders are no difference"
    write_video(video, shades(12), 24)
    ended = generate("--draft-video", video)
    assert ended.code == 2
    assert "sources.draft_video" in ended.err


def test_repro_makes_the_clip_again_and_refuses_another_video(
    generate, pw: Pw, bundle_dir: Path, tmp_path: Path, video: Path
) -> None:
    assert generate("--draft-video", video).code == 0
    receipt = tmp_path / "out" / "0.json"
    ended = pw("repro", receipt, "--model", bundle_dir)
    assert ended.code == 0, ended.err
    assert "byte for byte" in ended.out
    write_video(video, shades(12), 24)
    ended = pw("repro", receipt, "--model", bundle_dir)
    assert ended.code == 2
    assert "is not the file that" in ended.err
    video.unlink()
    assert "cannot read" in pw("repro", receipt, "--model", bundle_dir).err


def test_drafts_alone_need_no_transformer(generate, tmp_path: Path, video: Path) -> None:
    """What is left is the way through the VAE; texts are not encoded, which nothing reads."""
    ended = generate("--draft-video", video, "--draft-only", "--contact-sheet")
    assert ended.code == 0, ended.err
    assert "text: " not in ended.err
    assert tensors(tmp_path / "out/0.latents.safetensors").keys() == {"draft_latent"}
    assert frames(tmp_path / "out/0.mkv").shape == (5, 64, 96, 3)
    assert (tmp_path / "out/contact_sheet.png").exists()


def test_prompts_with_and_without_a_video_make_one_run(
    generate, pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path, video: Path
) -> None:
    lines = [
        {"id": "own", "text": "a cat", "draft_video": video.name},
        {"id": "b", "text": "a dog"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
        "--prompts", prompts, "--codec", "ffv1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "encode own" in ended.err
    assert "draft b" in ended.err
    assert "draft own" not in ended.err
    assert generate("--draft-video", video, out="alone").code == 0
    alone, same = frames(tmp_path / "alone/0.mkv"), frames(tmp_path / "out/own.mkv")
    assert np.array_equal(alone, same)


@pytest.mark.parametrize("changes", [{"draft_strength": 0.85}, {"step_cache": 0.05}])
def test_each_clip_of_such_a_run_could_be_made_alone_with_its_options(
    changes: dict[str, float], video: Path, tmp_path: Path
) -> None:
    """They are in its receipt and in its latents, with which `pw decode` and `pw repro` begin."""
    prompts = (Prompt("a cat", id="0"), Prompt("a dog", id="1", position=2, draft_video=video))
    options = RunOptions(device="cpu", **changes)  # type: ignore[arg-type]
    request = Request(prompts=prompts, preset=PRESETS["2k"], out=tmp_path, options=options)
    check_content(request)
    for prompt in prompts:
        check_content(replace(request, prompts=(prompt,), options=options_of(prompt, request)))


def test_upscale_is_generate_by_another_name(
    generate, pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path, video: Path
) -> None:
    assert generate("--draft-video", video).code == 0
    options = ("--model", bundle_dir, "--preset", preset, "--codec", "ffv1")
    ended = pw("upscale", video, *options, "--out", tmp_path / "up", "--prompt", "a cat")
    assert ended.code == 0, ended.err
    assert np.array_equal(frames(tmp_path / "up/walk.mkv"), frames(tmp_path / "out/0.mkv"))
    other = shutil.copy(video, tmp_path / "run.mp4")
    ended = pw(
        "upscale", video, other, *options, "--out", tmp_path / "two",
        "--prompt", "a cat", "--prompt", "a dog",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert {path.name for path in (tmp_path / "two").glob("*.mkv")} == {"walk.mkv", "run.mkv"}
    assert json.loads((tmp_path / "two/run.json").read_text())["prompt"]["text"] == "a dog"


def test_upscale_says_what_it_needs(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path, video: Path
) -> None:
    options = ("--model", bundle_dir, "--preset", preset)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(video, other)
    assert "no --prompt says" in pw("upscale", video, *options, "--out", tmp_path / "x").err
    two = ("upscale", video, *options, "--prompt", "a", "--prompt", "b", "--out", tmp_path / "x")
    assert "one for each" in pw(*two).err
    same = (
        "upscale",
        video,
        other / video.name,
        *options,
        "--prompt",
        "a",
        "--out",
        tmp_path / "x",
    )
    assert "several have the same" in pw(*same).err
    over = pw("upscale", video, *options, "--prompt", "a", "--out", tmp_path, "--overwrite")
    assert "has the name of a clip" in over.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--draft-strength", "0.5"], "no clip has one"),
        (["--draft-video", "VIDEO", "--draft-strength", "1.5"], "is a noise level"),
        (["--draft-video", "VIDEO", "--draft-strength", "0.2"], "no step of the draft begins"),
        (["--draft-video", "VIDEO", "--image", "VIDEO"], "one of --image and --draft-video"),
        (["--draft-video", "VIDEO", "--step-cache", "0.1"], "--step-cache needs a draft"),
        (["--draft-video", "VIDEO", "--set", "video.frames=49"], "shorter than the clip"),
        (["--draft-video", "VIDEO", "--preset", "draft"], "has no high-res stage"),
        (["--draft-video", "missing.mp4"], "missing.mp4"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    generate, tmp_path: Path, video: Path, arguments: list[str], text: str
) -> None:
    ended = generate(*[str(video) if word == "VIDEO" else word for word in arguments])
    assert ended.code == 2
    assert text in ended.err
    assert not list((tmp_path / "out").glob("0*"))


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_sound_that_ends_with_the_clip_is_copied(
    generate, pw: Pw, bundle_dir: Path, tmp_path: Path, codec: str
) -> None:
    video = write_video(tmp_path / "a.mp4", shades(6), 24, sound=0.25)
    ended = generate("--draft-video", video, "--codec", codec)
    assert ended.code == 0, ended.err
    assert "a.mp4: its sound is copied (aac)" in ended.err
    (clip,) = (tmp_path / "out").glob("0.m*")
    assert sounds(clip) == sounds(video) != []
    assert pw("verify", tmp_path / "out").code == 0
    latents = tmp_path / "out/0.latents.safetensors"
    options = ("--model", bundle_dir, "--out", tmp_path / "decoded")
    assert pw("decode", latents, *options).code == 0
    assert (tmp_path / "decoded" / clip.name).read_bytes() == clip.read_bytes()
    video.unlink()
    ended = pw("decode", latents, *options, "--overwrite")
    assert ended.code == 0
    assert "its sound, if it has any, is left out" in ended.err
    assert sounds(tmp_path / "decoded" / clip.name) == []
    assert np.array_equal(frames(tmp_path / "decoded" / clip.name), frames(clip))


def test_sound_is_known_by_its_codec_whatever_decodes_it(tmp_path: Path) -> None:
    """libavcodec decodes MP3 by "mp3float"."""
    length = Fraction(1, 4)
    video = write_video(
        tmp_path / "a.mkv", shades(6), 24, sound=float(length), sound_codec="libmp3lame"
    )
    sound = find_sound(video, length)
    assert sound is not None
    assert sound.codec == "mp3"
    assert why_left_out(sound, length, ".mp4") is None


@pytest.mark.parametrize(
    ("seconds", "codec", "text"),
    [
        (0.5, "aac", "it is longer, and the clip lasts 0.21 s"),
        (0.05, "aac", "it is 0.0"),
        (0.2, "pcm_s16le", ".mp4 files do not take pcm_s16le"),
    ],
)
def test_sound_that_does_not_fit_is_left_out_and_it_is_said(
    generate, tmp_path: Path, seconds: float, codec: str, text: str
) -> None:
    video = write_video(tmp_path / "a.mkv", shades(5), 24, sound=seconds, sound_codec=codec)
    ended = generate("--draft-video", video, "--codec", "h264")
    assert ended.code == 0, ended.err
    assert f"its sound is left out: {text}" in ended.err
    assert sounds(tmp_path / "out/0.mp4") == []


def test_a_video_that_changes_during_the_run_fails_its_clip(
    generate, video: Path, monkeypatch
) -> None:
    encode = pipeline.encode_sources

    def changed(run):
        write_video(video, shades(16), 25)
        encode(run)

    stages = {**pipeline.STAGES, "encode": changed}
    monkeypatch.setattr(pipeline, "STAGES", stages)
    ended = generate("--draft-video", video)
    assert ended.code == 3
    assert "was changed while the run was going on" in ended.err
