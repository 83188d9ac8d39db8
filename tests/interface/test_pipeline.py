# SPDX-License-Identifier: Apache-2.0
"""`Pipeline`: the clips of the command line, loaded once, cancelled at a block."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from rich.console import Console

from pw_kernels import op as op_module
from pw_runtime import Cancelled, Pipeline, Progress, Reporter, RunOptions
from pw_runtime import pipeline as pipeline_module
from pw_runtime.errors import BadRequest, BadResult, BadWeights
from pw_runtime.interface import frames as frames_module
from pw_runtime.interface import pipe as pipe_module
from pw_runtime.interface.start_picture import picture_file
from pw_runtime.job import networks as networks_module
from pw_runtime.system import progress as progress_module
from pw_runtime.system.picture_input import read_picture
from pw_runtime.types import Outcome, Request
from tests.convert.test_hub_cache import publish
from tests.e2e.pw import Pw, write_preset
from tests.oracle.checkpoint import Checkpoint

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset") / "small.toml")


@pytest.fixture(scope="module")
def pipe(bundle_dir: Path, small: Path) -> Pipeline:
    return Pipeline.from_pretrained(bundle_dir, preset=small, device="cpu")


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def leftovers() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("pw-frames-*"))


def pixels_of(file: Path) -> np.ndarray:
    """Return the frames of a lossless file, [F, H, W, 3]."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_picture_may_be_a_path_an_image_or_an_array(pipe: Pipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "start.png")
    ways: list[Any] = [tmp_path / "start.png", str(tmp_path / "start.png"), image, pixels]
    made = [pipe(PROMPT, image=way, draft_only=True).frames for way in ways]
    without = pipe(PROMPT, draft_only=True).frames
    assert all(np.array_equal(frames, made[0]) for frames in made)
    assert not np.array_equal(made[0], without)
    assert not list(Path(tempfile.gettempdir()).glob("pw-picture-*"))
    two = pipe([PROMPT, "a fox"], image=image, output=tmp_path / "clips")
    assert all(out.error is None for out in two)
    digests = {
        json.loads((tmp_path / f"clips/{i}.json").read_text())["sources"]["image"]["sha256"]
        for i in range(2)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["phone.jpg", "scan.tiff"])
def test_a_picture_that_lies_on_its_side_is_turned_as_its_file_is(
    name: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / name, exif=exif)
    with picture_file(Image.open(tmp_path / name)) as path:
        assert path is not None
        assert read_picture(path).size == read_picture(tmp_path / name).size == (32, 64)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (7, "image has a wrong type"),
        (np.zeros((80, 120), np.uint8), "an array of another kind"),
        (np.zeros((80, 120, 3), np.float32), "an array of another kind"),
        (Image.new("CMYK", (64, 64)), "no PNG file has"),
        (Image.new("RGB", (20, 64)), "at least 32 pixels"),
        ("none.png", "cannot read"),
    ],
)
def test_what_is_no_picture_is_refused(pipe: Pipeline, image: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        pipe(PROMPT, image=image)
    assert not leftovers()


def test_frames_are_those_of_the_lossless_file_bit_for_bit(
    bundle_dir: Path, small: Path, tmp_path: Path
) -> None:
    options = RunOptions(codec="ffv1", device="cpu")
    with Pipeline.from_pretrained(str(bundle_dir), preset=str(small), options=options) as pipe:
        out = pipe(PROMPT, seed=3)
        file = pipe(PROMPT, seed=3, output=tmp_path / "ball.mkv")
    assert isinstance(out.frames, np.ndarray)
    assert (out.frames.shape, out.frames.dtype) == ((5, 96, 192, 3), np.uint8)
    assert (out.video, out.receipt, out.seed, out.fps) == (None, None, 3, 24)
    assert (file.video, file.frames) == (tmp_path / "ball.mkv", None)
    assert file.receipt == tmp_path / "ball.json"
    np.testing.assert_array_equal(out.frames, pixels_of(tmp_path / "ball.mkv"))
    assert leftovers() == set()


@pytest.mark.parametrize("text", [PROMPT, f" {PROMPT}\n"])
def test_the_file_is_that_of_the_command_line(
    pipe: Pipeline, pw: Pw, bundle_dir: Path, small: Path, tmp_path: Path, text: str
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", small, "--prompt", text, "--seed", 4,
        "--device", "cpu", "--out", tmp_path / "cli",
    )  # fmt: skip
    assert ended.code == 0
    assert pipe(text, seed=4, output=tmp_path / "api" / "0.mp4").prompt == text
    assert (tmp_path / "api" / "0.mp4").read_bytes() == (tmp_path / "cli" / "0.mp4").read_bytes()


def test_a_list_is_one_run_and_a_clip_that_fails_has_its_error(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, failing_ids = frames_module._decoded, {"1"}

    def failing(vae: object, run: object, clip: object, step: object) -> torch.Tensor:
        if clip.prompt.id in failing_ids:  # type: ignore[attr-defined]
            raise BadResult("nothing to see")
        return decoded(vae, run, clip, step)  # type: ignore[arg-type]

    files = pipe(["a cat", PROMPT], seed=-1, output=tmp_path, draft_only=True)
    assert [file.video for file in files] == [tmp_path / "0.mp4", tmp_path / "1.mp4"]
    assert files[0].seed == files[1].seed >= 0
    monkeypatch.setattr(frames_module, "_decoded", failing)
    cat, ball = pipe(["a cat", PROMPT], output_type="pt", draft_only=True)
    assert isinstance(cat.frames, torch.Tensor)
    assert (ball.frames, ball.error) == (None, "nothing to see")
    (kept,) = leftovers()  # its latents are not lost
    assert {file.name for file in kept.iterdir()} == {"1.latents.safetensors"}
    failing_ids.add("0")
    with pytest.raises(BadResult, match="nothing to see"):
        pipe("a cat", draft_only=True)


def test_images_and_tensors_have_the_same_pixels(pipe: Pipeline) -> None:
    first, second = (pipe(PROMPT, draft_only=True, output_type=kind) for kind in ("pil", "pt"))
    assert isinstance(first.frames, list)
    assert isinstance(second.frames, torch.Tensor)
    stacked = np.stack([np.asarray(image) for image in first.frames])
    np.testing.assert_array_equal(stacked, second.frames.numpy())
    second.frames.add_(1)  # an ordinary tensor, although it was computed in inference mode


def test_networks_are_loaded_once_for_several_calls(
    bundle_dir: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = networks_module.load_transformer

    def counted(bundle: object, stage: str, *rest: object) -> object:
        loaded.append(stage)
        return load(bundle, stage, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(networks_module, "load_transformer", counted)
    with Pipeline.from_pretrained(bundle_dir, preset=small, device="cpu") as pipe:
        first = pipe(PROMPT)
        second = pipe(PROMPT)
    assert loaded == ["draft", "highres"]
    np.testing.assert_array_equal(first.frames, second.frames)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="the pipeline is closed"):
        pipe(PROMPT)


def test_numbers_of_a_call_replace_those_of_the_preset(pipe: Pipeline) -> None:
    totals: dict[str, int] = {}

    def callback(progress: Progress) -> None:
        totals[progress.stage] = progress.total

    out = pipe(PROMPT, num_inference_steps=3, num_frames=9, guidance_scale=1, callback=callback)
    assert totals == {"text": 1, "draft": 2, "highres": 3, "decode": 9}
    assert out.frames is not None
    assert len(out.frames) == 9
    with pytest.raises(BadRequest, match=r"(?s)this call.*highres.steps is 0"):
        pipe(PROMPT, num_inference_steps=0)


def test_keys_of_a_preset_are_changed_as_by_set(bundle_dir: Path, small: Path) -> None:
    changes = ("draft.steps=3", "video.fps=12")
    pipe = Pipeline.from_pretrained(bundle_dir, preset=small, changes=changes, device="cpu")
    assert (pipe.preset.draft.steps, pipe.preset.video.fps) == (3, 12)
    with pytest.raises(BadRequest, match="changes are for a preset that is named"):
        Pipeline.from_pretrained(bundle_dir, preset=pipe.preset, changes=changes)


def test_the_callback_is_told_block_by_block_and_ends_the_call(
    pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Progress] = []

    def callback(progress: Progress) -> bool:
        seen.append(progress)
        return progress.stage != "highres" or progress.done == 0

    with pytest.raises(Cancelled):
        pipe(PROMPT, callback=callback)
    assert seen[-1].stage == "highres"
    assert 0 < seen[-1].done < 1  # within the first step
    assert leftovers() == set()
    assert "kept" not in capsys.readouterr().err  # nothing is


def test_a_call_into_a_file_goes_on_where_it_was_cancelled_and_is_made_once(
    pipe: Pipeline, tmp_path: Path
) -> None:
    file, whole = tmp_path / "ball.mp4", tmp_path / "whole" / "ball.mp4"
    with pytest.raises(Cancelled):
        pipe(PROMPT, output=file, callback=lambda progress: progress.stage != "highres")
    stages: list[str] = []
    out = pipe(PROMPT, output=file, callback=lambda progress: stages.append(progress.stage))
    assert set(stages) == {"highres", "decode"}
    assert out.video == file
    pipe(PROMPT, output=whole)
    assert file.read_bytes() == whole.read_bytes()
    stages.clear()
    assert pipe(PROMPT, output=file, callback=lambda p: stages.append(p.stage)).video == file
    assert stages == []
    with pytest.raises(BadRequest, match="another"):
        pipe("a blue star", output=file)
    assert pipe("a blue star", output=file, overwrite=True).video == file
    assert file.read_bytes() != whole.read_bytes()


def test_a_warning_is_said_once_in_the_log_of_the_program_or_on_stderr(
    bundle_dir: Path,
    small: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = io.StringIO()
    pipe = Pipeline.from_pretrained(bundle_dir, preset=small, device="cpu")
    for handlers, counts in (([], (1, 0)), ([logging.StreamHandler(log)], (0, 1))):
        monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
        pipe(PROMPT, draft_only=True)  # the negative prompt is longer than this model takes
        texts = (capsys.readouterr().err, log.getvalue())
        assert tuple(text.count("text truncated") for text in texts) == counts


def test_what_the_callback_raises_is_raised_by_the_call(pipe: Pipeline) -> None:
    def callback(progress: Progress) -> None:
        raise LookupError("my own")

    with pytest.raises(LookupError, match="my own"):
        pipe(PROMPT, callback=callback)
    assert leftovers() == set()
    assert pipe(PROMPT, draft_only=True).frames is not None


def test_what_the_callback_raises_at_the_last_report_is_raised_too(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe(PROMPT, draft_only=True, callback=seen.append)
    left = iter(range(len(seen) - 1, -1, -1))

    def callback(progress: Progress) -> None:
        if next(left) == 0:
            raise LookupError("the last one")

    with pytest.raises(LookupError, match="the last one"):
        pipe(PROMPT, draft_only=True, callback=callback)
    assert leftovers() == set()


def test_a_call_that_fails_before_anything_is_computed_leaves_no_folder(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(request: Request, *given: object, **options: object) -> None:
        assert request.in_memory  # which the plan counts
        raise BadWeights("a shard is damaged")

    monkeypatch.setattr(pipe_module, "generate", damaged)
    with pytest.raises(BadWeights):
        pipe(PROMPT)
    assert leftovers() == set()


def test_another_thread_waits_and_may_cancel(pipe: Pipeline) -> None:
    order: list[str] = []
    inside = threading.Event()
    waiting = threading.Event()

    def callback(progress: Progress) -> None:
        if progress.stage == "draft" and not inside.is_set():
            inside.set()
            assert waiting.wait(60)
            pipe.cancel()

    def second() -> None:
        assert inside.wait(60)
        waiting.set()
        pipe(PROMPT, draft_only=True)
        order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.raises(Cancelled):
        pipe(PROMPT, callback=callback)
    order.append("first")
    thread.join(60)
    assert not thread.is_alive()
    assert sorted(order) == ["first", "second"]


def test_a_model_is_named_by_its_place_in_the_cache_of_the_hub(
    bundle_dir: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = publish(tmp_path, "someone/small", bundle_dir)
    pipe = Pipeline.from_pretrained("someone/small", preset=small, device="cpu")
    assert pipe.bundle.root == snapshot
    with pytest.raises(BadRequest, match="hf download someone/other"):
        Pipeline.from_pretrained("someone/other", preset=small)


def test_a_published_checkpoint_is_converted_on_first_use(
    checkpoint: Checkpoint, small: Path, bundle_dir: Path, pipe: Pipeline
) -> None:
    official = Pipeline.from_pretrained(
        checkpoint.base, highres=checkpoint.highres, preset=small, device="cpu"
    )
    assert official.bundle.root != bundle_dir
    ours, theirs = pipe(PROMPT, seed=2), official(PROMPT, seed=2)
    np.testing.assert_array_equal(ours.frames, theirs.frames)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "clip.mkv"}, "codec h264 is written as .mp4"),
        ({"output": "clip.mp4", "output_type": "np"}, "both are asked for"),
        ({"output_type": "gif"}, "unknown output_type"),
        ({"num_frames": 6}, "video.frames is 6"),
        ({"seed": 2**80}, "the seed is too large"),
    ],
)
def test_what_cannot_work_is_one_error(
    pipe: Pipeline, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        pipe(PROMPT, **arguments)  # type: ignore[call-overload]
    assert leftovers() == set()


def test_bad_lists_and_models_are_one_error(
    pipe: Pipeline, bundle_dir: Path, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="there is no prompt"):
        pipe([])
    with pytest.raises(BadRequest, match="go into a folder"):
        pipe(["a", "b"], output="clip.mp4")
    with pytest.raises(BadRequest, match="a bundle has its weights"):
        Pipeline.from_pretrained(bundle_dir, preset=small, highres="model.pt")
    with pytest.raises(BadRequest, match="unknown device"):
        Pipeline.from_pretrained(bundle_dir, preset=small, device="tpu!")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompt", 5),
        ("prompt", b"a red ball"),
        ("prompt", [PROMPT, None]),
        ("negative_prompt", 5),
        ("seed", "1"),
        ("seed", 1.5),
        ("seed", None),
        ("num_inference_steps", "4"),
        ("guidance_scale", "high"),
        ("num_frames", True),
        ("output", 7),
        ("callback", 5),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(pipe: Pipeline, argument: str, value: object) -> None:
    """Seen: a TypeError from deep within, or one after half the clip was made."""
    arguments = {"prompt": PROMPT, argument: value}
    with pytest.raises(BadRequest, match=f"{argument} has a wrong type"):
        pipe(**arguments)  # type: ignore[call-overload]


@pytest.mark.parametrize("prompt", ["", "  ", ["a cat", ""]])
def test_an_empty_prompt_is_refused(pipe: Pipeline, prompt: str | list[str]) -> None:
    with pytest.raises(BadRequest, match="a prompt is empty"):
        pipe(prompt)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"options": RunOptions(codec="xvid")}, "options.codec cannot be"),  # type: ignore[arg-type]
        ({"options": RunOptions(chunk="many")}, "options.chunk cannot be"),  # type: ignore[arg-type]
        ({"options": {"codec": "h264"}}, "options has a wrong type"),
        ({"host_memory": "8GiB"}, "host_memory has a wrong type"),
        ({"changes": "draft.steps=3"}, "changes has a wrong type"),
    ],
)
def test_what_no_run_could_have_is_refused_when_the_model_is_opened(
    bundle_dir: Path, arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadRequest, match=told):
        Pipeline.from_pretrained(bundle_dir, preset="nano", **arguments)


def test_an_output_is_shown_without_its_pixels(pipe: Pipeline) -> None:
    assert "frames" not in repr(pipe(PROMPT, draft_only=True))


def test_the_progress_of_a_call_is_its_own(
    bundle_dir: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: the end of the first call beside the second, and the time since the first began."""
    now, reporter, screens = 100.0, Reporter(), list[str]()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now))

    def made(request: Request, bundle: object, told: Reporter, **rest: object) -> list[Outcome]:
        nonlocal now
        screen = io.StringIO()
        reporter._console = Console(file=screen, force_terminal=True, width=100)
        with told.steps("draft 0", 1):
            assert reporter._bars is not None
            reporter._bars.refresh()
            screens.append(screen.getvalue())
            for fraction in (0.0, 1.0):
                told.progress(Progress(clip="0", stage="draft", done=fraction, total=1,
                                       fraction=fraction, seconds_left=None))  # fmt: skip
                now += 3700
            reporter._bars.refresh()
            screens.append(screen.getvalue())
        return [Outcome(prompt=request.prompts[0], video=tmp_path / "0.mp4", error=None)]

    monkeypatch.setattr(pipe_module, "generate", made)
    with Pipeline.from_pretrained(
        bundle_dir, preset=small, device="cpu", reporter=reporter
    ) as pipe:
        for _ in range(2):
            pipe(PROMPT, output=tmp_path)
    assert ["whole run" in screen for screen in screens] == [False, True, False, True]
    assert "2:03:20" in screens[1]
    assert "2:03:20" in screens[3]
    assert "4:06:40" not in screens[3]


def test_calls_of_two_pipelines_do_not_overlap(bundle_dir: Path, small: Path) -> None:
    """Seen: kernels of the one in the clip of the other, as they are chosen for the process."""
    begun, calling = threading.Event(), threading.Event()
    order: list[str] = []
    first, second = (
        Pipeline.from_pretrained(
            bundle_dir, preset=small, options=RunOptions(device="cpu", conv=conv)
        )
        for conv in ("onednn", "auto")
    )

    def told(progress: Progress) -> None:
        begun.set()
        calling.wait()
        order.append("first")

    def other() -> None:
        begun.wait()
        calling.set()
        second(PROMPT, draft_only=True, callback=lambda progress: order.append("second"))

    thread = threading.Thread(target=other)
    thread.start()
    first(PROMPT, num_inference_steps=40, callback=told)
    thread.join()
    assert set(order) == {"first", "second"}
    assert order == sorted(order)
    assert op_module._requested == {}


def test_a_callback_cannot_call_or_close_its_own_pipeline(pipe: Pipeline) -> None:
    for use in (lambda: pipe(PROMPT), pipe.close):
        with pytest.raises(BadRequest, match="the callback of a call uses the same pipeline"):
            pipe(PROMPT, draft_only=True, callback=lambda progress, use=use: use())  # type: ignore[misc]


@pytest.mark.parametrize("error", [BadResult("nothing to see"), KeyboardInterrupt()])
def test_what_ends_before_there_is_a_draft_leaves_no_folder(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Seen: a folder with the text alone, of which nobody was told."""

    def ended(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(pipeline_module, "denoise_draft", ended)
    with pytest.raises(type(error)):
        pipe(PROMPT)
    assert leftovers() == set()


def test_an_interrupted_call_keeps_the_latents_of_which_it_tells(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoded = frames_module._decoded

    def interrupted(vae: Any, run: Any, clip: Any, step: Any) -> torch.Tensor:
        if clip.prompt.id == "1":
            raise KeyboardInterrupt
        return decoded(vae, run, clip, step)

    monkeypatch.setattr(frames_module, "_decoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe(["a cat", PROMPT], draft_only=True)
    (folder,) = leftovers()
    assert {file.name for file in folder.iterdir()} == {"1.latents.safetensors"}
    assert f"the latents of 1 are kept in {folder}" in caplog.text


def test_one_frame_is_the_picture_of_the_command_line(
    pipe: Pipeline, pw: Pw, bundle_dir: Path, small: Path, tmp_path: Path
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", small, "--prompt", PROMPT, "--frames", "1",
        "--device", "cpu", "--out", tmp_path / "cli",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    wanted = (tmp_path / "cli" / "0.png").read_bytes()
    for output, file in (("api", "api/0.png"), ("api/a.png", "api/a.png")):
        out = pipe(PROMPT, num_frames=1, output=tmp_path / output)
        assert out.video == tmp_path / file
        assert out.video.read_bytes() == wanted
    video = tmp_path / "a.mp4"
    assert pipe(PROMPT, num_frames=1, output=video).video == video
