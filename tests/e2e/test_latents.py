# SPDX-License-Identifier: Apache-2.0
"""Nothing that was computed is lost: latents are on the disk before the decode, and `pw decode`
makes the clip of them that the run would have made."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pw_runtime import pipeline
from pw_runtime.errors import WriteFailed
from pw_runtime.job import clip as clip_module
from pw_runtime.job import networks as networks_module
from pw_runtime.stages import write
from pw_runtime.system.folder_lock import NAME as LOCK
from tests.e2e.pw import Ended, Pw

LATENTS = "0.latents.safetensors"


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path):
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--codec", "ffv1", "--prompt", "a cat", *arguments,
        )  # fmt: skip

    return run


@pytest.fixture
def whole(generate, tmp_path: Path) -> np.ndarray:
    """Frames of the run that nothing disturbs."""
    assert generate("--out", tmp_path / "whole").code == 0
    return frames(tmp_path / "whole" / "0.mkv")


def frames(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def told_command(err: str) -> list[str]:
    """The command that the message tells, without `pw`."""
    (line,) = [one for one in err.splitlines() if "to finish this clip, run: " in one]
    return shlex.split(line.partition("run: ")[2])[1:]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file may grow past what the latents took."""
    encoded_video = pipeline.encoded_video
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(chunks, path, **arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return encoded_video(chunks, path, **arguments)

    monkeypatch.setattr(pipeline, "encoded_video", limited)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def broken_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(*arguments: object) -> None:
        raise av.error.ExternalError(-542398533, "Generic error in an external library")

    monkeypatch.setattr(write, "_mux", broken)
    yield


@contextmanager
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    decode_frames = pipeline.decode_frames

    def run_out(*arguments, **options):
        yield next(decode_frames(*arguments, **options))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "decode_frames", run_out)
    yield


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (full_disk, "File too large"),
        (broken_encoder, "Generic error in an external library"),
        (no_memory, "out of memory"),
    ],
)
def test_a_fault_after_the_denoise_costs_one_command(
    generate, pw, whole, tmp_path, monkeypatch, fault, says
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.mkv").write_bytes(b"an earlier clip")
    with monkeypatch.context() as patch, fault(patch):
        ended = generate("--overwrite")
    assert ended.code == 3
    assert says in ended.err
    assert "Traceback" not in ended.err
    assert names(tmp_path / "out") == [LATENTS, "0.mkv"]
    assert (tmp_path / "out" / "0.mkv").read_bytes() == b"an earlier clip"
    finished = pw(*told_command(ended.err))
    assert finished.code == 0, finished.err
    assert finished.out.split() == [str(tmp_path / "out" / "0.mkv")]
    assert (frames(tmp_path / "out" / "0.mkv") == whole).all()
    assert names(tmp_path / "out") == ["0.json", LATENTS, "0.mkv"]


def test_the_command_makes_the_clip_of_the_run_that_tells_it(
    generate, pw, tmp_path, monkeypatch
) -> None:
    """Its codec and its decoder, whoever made the latents: an earlier run, or one before it."""
    other = ("--codec", "h264", "--vae-precision", "bf16")
    with monkeypatch.context() as patch, broken_encoder(patch):
        assert generate().code == 3
        taken_over = generate(*other)
        assert "going on at the decode stage" in taken_over.err
        again = pw(*told_command(taken_over.err))
    assert again.code == 3
    for ended in (taken_over, again):
        assert set(other) <= set(told_command(ended.err))
    finished = pw(*told_command(again.err))
    assert finished.code == 0, finished.err
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["video"]["file"] == "0.mp4"
    assert receipt["finished_from_latents"]["vae_precision"] == "bf16"


KILLED = """
import os, signal, sys
from pw_runtime import pipeline
from pw_runtime.cli import main as cli
decode_frames = pipeline.decode_frames
def killed(*arguments, **options):
    yield next(decode_frames(*arguments, **options))
    os.kill(os.getpid(), signal.SIGKILL)
pipeline.decode_frames = killed
cli.main()
"""


@pytest.mark.slow
def test_a_run_killed_in_the_decode_leaves_the_latents_of_all_its_clips(
    pw, bundle_dir, preset, whole, tmp_path
) -> None:
    out = tmp_path / "out"
    arguments = (
        "generate", "--model", bundle_dir, "--preset", preset, "--out", out, "--codec", "ffv1",
        "--prompt", "a cat", "--prompt", "a dog",
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    kept = ["0.latents.safetensors", "1.latents.safetensors"]
    assert [name for name in names(out) if not name.startswith(".")] == kept
    finished = pw("decode", *(out / name for name in kept), "--model", bundle_dir)
    assert finished.code == 0, finished.err
    assert names(out) == ["0.json", kept[0], "0.mkv", "1.json", kept[1], "1.mkv"]
    assert (frames(out / "0.mkv") == whole).all()


@pytest.mark.parametrize("stage", ["draft", "highres"])
def test_memory_that_runs_out_in_a_denoise_keeps_what_there_was(
    generate, pw, bundle_dir, tmp_path, monkeypatch, stage
) -> None:
    def run_out(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, f"denoise_{stage}", run_out)
        ended = generate()
    assert ended.code == 3
    assert "out of memory" in ended.err
    assert "Traceback" not in ended.err
    file = tmp_path / "out" / LATENTS
    if stage == "draft":
        assert names(tmp_path / "out") == [LATENTS]  # the text
        return
    assert f"the results so far of 0 are kept in {file}" in ended.err
    refused = pw("decode", file, "--model", bundle_dir)
    assert refused.code == 2
    assert "ends before the highres stage" in refused.err
    assert generate("--noise", file, "--out", tmp_path / "again").code == 0


def test_a_decoder_that_does_not_fit_leaves_all_latents(generate, tmp_path, monkeypatch) -> None:
    def run_out(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(networks_module, "load_decoder", run_out)
    ended = generate("--prompt", "a dog")
    assert ended.code == 3
    assert "out of memory" in ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("to finish this clip, run") == 2
    assert names(tmp_path / "out") == [LATENTS, "1.latents.safetensors"]


def test_a_clip_whose_decode_fails_is_as_before_and_can_be_decoded_again(
    generate, whole, tmp_path, monkeypatch
) -> None:
    """What a retry needs: after an exception the clip is as it was."""
    failed = []

    def twice(function):
        def run(vae, run, clip, *rest):
            if clip.prompt.id == "0":
                kept = (clip.filmstrips, clip.video, clip.latents, clip.highres)
                oom = pytest.raises(torch.OutOfMemoryError)
                with monkeypatch.context() as patch, no_memory(patch), oom:
                    function(vae, run, clip, *rest)
                assert (clip.filmstrips, clip.video, clip.latents, clip.highres) == kept
                failed.append(function.__name__)
            return function(vae, run, clip, *rest)

        return run

    monkeypatch.setattr(pipeline, "decode_clip", twice(pipeline.decode_clip))
    ended = generate("--prompt", "a dog", "--contact-sheet")
    assert ended.code == 0, ended.err
    assert failed == ["decode_clip"]
    assert (frames(tmp_path / "out" / "0.mkv") == whole).all()


def test_before_the_decode_latents_are_on_the_disk_and_networks_are_gone(
    generate, tmp_path, monkeypatch
) -> None:
    load_transformer, load_decoder = networks_module.load_transformer, networks_module.load_decoder
    nets, seen, decoded = [], [], []
    denoise_highres, decode_frames = pipeline.denoise_highres, pipeline.decode_frames

    def loaded(*arguments):
        net = load_transformer(*arguments)
        nets.append(weakref.ref(net))
        return net

    def looked(*arguments):
        assert [net() for net in nets] == [None, None]
        assert names(tmp_path / "out") == [LATENTS, "1.latents.safetensors"]
        assert [one() for one in seen] == [None, None]
        return load_decoder(*arguments)

    def painted(*arguments):
        latent = denoise_highres(*arguments)
        decoded.append(latent.x.clone())
        seen.append(weakref.ref(latent.x))
        return latent

    def compared(vae, latent, *rest, **options):
        assert torch.equal(latent.x, decoded.pop(0))
        return decode_frames(vae, latent, *rest, **options)

    monkeypatch.setattr(networks_module, "load_transformer", loaded)
    monkeypatch.setattr(networks_module, "load_decoder", looked)
    monkeypatch.setattr(pipeline, "denoise_highres", painted)
    monkeypatch.setattr(pipeline, "decode_frames", compared)
    ended = generate("--prompt", "a dog")
    assert ended.code == 0, ended.err
    assert decoded == []
    assert names(tmp_path / "out") == ["0.json", "0.mkv", "1.json", "1.mkv"]


def test_a_disk_that_refuses_the_latents_does_not_cost_the_clip(
    generate, whole, tmp_path, monkeypatch
) -> None:
    def refused(path, *rest):
        raise WriteFailed(f"cannot write {path}", got="No space left on device")

    monkeypatch.setattr(clip_module, "write_latents", refused)
    ended = generate()
    assert ended.code == 0, ended.err
    assert "its latents stay in memory until they are decoded" in ended.err
    assert (frames(tmp_path / "out" / "0.mkv") == whole).all()
    assert "No space left" in json.loads((tmp_path / "out" / "0.json").read_text())["notices"][-1]


@pytest.mark.parametrize("by", ["out", "link"])
def test_a_noise_file_that_the_run_would_replace_is_refused(generate, tmp_path, by) -> None:
    assert generate("--save-latents").code == 0
    before = (tmp_path / "out" / LATENTS).read_bytes()
    (tmp_path / "link").symlink_to("out")
    ended = generate("--noise", tmp_path / by / LATENTS, "--overwrite")
    assert ended.code == 2
    assert "would replace its noise file" in ended.err
    assert (tmp_path / "out" / LATENTS).read_bytes() == before


def test_a_clip_that_grows_is_told_and_kept_when_the_run_fails(
    generate, tmp_path, monkeypatch
) -> None:
    growing = tmp_path / "out" / "0.partial.mp4"
    encoded_video = pipeline.encoded_video

    def broken(chunks, path, **arguments):
        assert arguments["partial_video"] == growing
        growing.write_bytes(b"half a clip")
        raise WriteFailed(f"cannot write {path}")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encoded_video", broken)
        ended = generate("--codec", "h264", "--fragmented")
    assert ended.code == 3
    assert f"partial video: {growing}" in ended.err
    assert "--fragmented" in told_command(ended.err)
    assert pipeline.encoded_video is encoded_video
    ended = generate("--codec", "h264", "--fragmented")
    assert ended.code == 0
    assert "going on at the decode stage" in ended.err
    assert f"{growing} can be watched" in ended.err
    assert names(tmp_path / "out") == ["0.json", "0.mp4"]


def test_fragments_are_refused_before_anything_is_computed(
    generate, pw, bundle_dir, preset, tmp_path
) -> None:
    ended = generate("--fragmented")
    assert ended.code == 2
    assert "which ffv1 does not" in ended.err
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "text": "x"}\n{"id": "a.partial", "text": "x"}')
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
        "--prompts", prompts, "--fragmented",
    )  # fmt: skip
    assert ended.code == 2
    assert "has the name of the clip a.partial" in ended.err


def test_latents_that_another_run_has_replaced_are_not_decoded(
    generate, tmp_path, monkeypatch
) -> None:
    """Seen: two runs into one folder, and the receipt of one beside the picture of the other."""
    assert generate("--out", tmp_path / "other", "--seed", 5, "--save-latents").code == 0
    load_decoder = networks_module.load_decoder

    def replaced(*arguments):
        (tmp_path / "other" / LATENTS).replace(tmp_path / "out" / LATENTS)
        return load_decoder(*arguments)

    monkeypatch.setattr(networks_module, "load_decoder", replaced)
    ended = generate()
    assert ended.code == 3
    assert "no longer belongs to this clip" in ended.err
    assert not (tmp_path / "out" / "0.mkv").exists()
