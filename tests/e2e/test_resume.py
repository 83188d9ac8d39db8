# SPDX-License-Identifier: Apache-2.0
"""The same command again: it goes on where the run before was ended, with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_runtime import Prompt, Reporter, Request, RunOptions, find_preset, generate, open_bundle
from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.job import frame_log
from pw_runtime.job import journal as journal_module
from pw_runtime.job import networks as networks_module
from pw_runtime.job.frame_log import FrameLog
from pw_runtime.job.journal import ClipLog
from pw_runtime.job.run import Run
from pw_runtime.planning.oom_fallback import OomFallback
from pw_runtime.resume import Overrides, finish
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.stages.decode_past import Past
from pw_runtime.system.step import Step
from pw_runtime.system.stop import Stopped, StopRequest
from pw_runtime.types import StageName
from tests.e2e.pw import write_preset

LATENTS = "0.latents.safetensors"
STEPS = "0.steps.safetensors"
FRAMES = "0.frames.safetensors"
MEASURED = ("seconds", "peak_memory_bytes", "plan", "kernel_launches")  # of a receipt


class Told(Reporter):
    """Collects what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def clip(tmp_path: Path) -> Request:
    return Request(
        prompts=(Prompt("a fox"),),
        preset=find_preset(str(write_preset(tmp_path / "p.toml", draft_steps=4, highres_steps=4))),
        out=tmp_path / "out",
        options=RunOptions(device="cpu", codec="ffv1"),
    )


@pytest.fixture
def make(bundle_dir: Path) -> Callable[..., Told]:
    def run(request: Request, stop: StopRequest | None = None) -> Told:
        told = Told()
        generate(request, open_bundle(bundle_dir), told, stop=stop)
        return told

    return run


def result(out: Path) -> tuple[bytes, dict[str, Any]]:
    """The video, and the receipt without what was measured."""
    receipt = json.loads((out / "0.json").read_text())
    return (out / "0.mkv").read_bytes(), {
        name: value for name, value in receipt.items() if name not in MEASURED
    }


def stop_in(monkeypatch: pytest.MonkeyPatch, stage: str, share: float = 0.0) -> StopRequest:
    """Ask for an end once a stage has come that far, in steps or frames."""
    stop, done = StopRequest(), [0.0]
    advance = Step.advance

    def counted(step: Step, count: float = 1) -> None:
        if step.label.startswith(stage):
            done[0] += count
            if done[0] > share:
                stop.request()
        advance(step, count)

    monkeypatch.setattr(Step, "advance", counted)
    return stop


@pytest.mark.parametrize("stage", ["draft", "highres", "decode"])
def test_the_same_call_goes_on_at_the_stage_that_was_ended(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, stage))
    assert not (clip.out / "0.mkv").exists()
    monkeypatch.setattr(networks_module, "load_text_network", lambda *_: pytest.fail("text again"))
    told = make(clip)
    assert f"prompt 0: going on at the {stage} stage" in told.text
    assert result(clip.out) == result(whole.out)
    assert sorted(path.name for path in clip.out.iterdir()) == ["0.json", "0.mkv"]


def test_only_what_is_left_is_planned_and_loaded(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, "decode"))
    monkeypatch.setattr(networks_module, "load_transformer", lambda *_: pytest.fail("loaded"))
    told = make(clip)
    assert [line for line in told.lines if line.startswith(("text:", "draft:", "highres:"))] == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompts": (Prompt("a dog"),)}, 'prompt.text is "a fox", wanted "a dog"'),
        ({"seed": 3}, "seeds.base is 0, wanted 3"),
        (
            {"options": RunOptions(device="cpu", codec="ffv1", precision="bf16")},
            'options.precision is "fp32", wanted "bf16"',
        ),
    ],
)
def test_what_is_begun_of_another_clip_is_refused_with_both_values(
    clip: Request,
    make: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    field: str,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, "highres"))
    before = (clip.out / LATENTS).read_bytes()
    with pytest.raises(BadRequest, match="earlier run") as refused:
        make(replace(clip, **change))
    assert field in str(refused.value)
    assert (clip.out / LATENTS).read_bytes() == before


def test_what_is_begun_with_other_versions_is_not_mixed(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, "highres"))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(BadRequest, match=f"machine.threads is {threads}, wanted {threads + 1}"):
        make(clip)
    make(replace(clip, fresh=True))
    assert (clip.out / "0.mkv").exists()


def test_a_flipped_bit_costs_the_stage_and_what_follows(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, "decode"))
    file = clip.out / LATENTS
    highres = load_file(file)["highres_latent"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(highres) + 5] ^= 1
    file.write_bytes(content)
    told = make(clip)
    assert "is damaged: highres_latent cannot be used" in told.text
    assert "going on at the highres stage" in told.text
    assert result(clip.out) == result(whole.out)


def test_a_file_that_was_cut_is_told_and_the_clip_is_made_anew(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, "decode"))
    file = clip.out / LATENTS
    file.write_bytes(file.read_bytes()[:-7])
    assert "prompt 0 is computed anew: cannot read the latents file" in make(clip).text
    assert (clip.out / "0.mkv").exists()


def test_what_a_run_could_not_remove_before_it_was_killed_is_removed(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        make(clip)
    assert {LATENTS, "0.json", "0.mkv"} <= {path.name for path in clip.out.iterdir()}
    before = (clip.out / "0.mkv").stat().st_ino
    make(clip)
    assert (clip.out / "0.mkv").stat().st_ino == before
    assert {LATENTS, "0.steps.safetensors"}.isdisjoint(path.name for path in clip.out.iterdir())


# ---- drafts of another run ---------------------------------------------------------------------


@pytest.fixture
def gallery(clip: Request, make: Callable[..., Told]) -> Path:
    out = clip.out.with_name("gallery")
    options = replace(clip.options, draft_only=True, save_latents=True)
    make(replace(clip, out=out, options=options))
    return out


def test_a_chosen_draft_is_finished_without_its_networks(
    clip: Request, gallery: Path, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole)
    load = networks_module.load_transformer

    def loaded(bundle: Any, stage: str, *rest: Any) -> Any:
        assert stage == "highres"
        return load(bundle, stage, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(networks_module, "load_text_network", lambda *_: pytest.fail("text again"))
    monkeypatch.setattr(networks_module, "load_transformer", loaded)
    before = (gallery / LATENTS).read_bytes()
    told = make(replace(clip, drafts=gallery))
    assert [line for line in told.lines if line.startswith(("text:", "draft:"))] == []
    assert result(clip.out)[0] == result(whole.out)[0]
    assert any("the draft is that of" in text for text in result(clip.out)[1]["notices"])
    assert (gallery / LATENTS).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": (Prompt("a dog"),)}, 'prompt.text is "a fox", wanted "a dog"'),
        ({"negative": "blur"}, 'wanted "blur"'),
        ({"seed": 3}, "seeds.draft is 100, wanted 103"),
        ({"prompts": (Prompt("a fox", "other"),)}, "other.latents.safetensors"),
        (
            {"options": RunOptions(device="cpu", codec="ffv1", draft_only=True)},
            "this run has no high-res stage",
        ),
    ],
)
def test_another_draft_is_refused(
    clip: Request, gallery: Path, make: Callable[..., Told], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        make(replace(clip, drafts=gallery, **change))
    assert says in str(refused.value)


def test_a_damaged_draft_is_refused(
    clip: Request, gallery: Path, make: Callable[..., Told]
) -> None:
    file = gallery / LATENTS
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadRequest, match="damaged"):
        make(replace(clip, drafts=gallery))


# ---- between two steps -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["draft", "highres"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_same_call_goes_on_after_the_last_whole_step(
    tmp_path: Path,
    clip: Request,
    make: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    stage: StageName,
    solver: str,
    steps: int,
) -> None:
    file = write_preset(tmp_path / "s.toml", draft_steps=4, highres_steps=4, solver=solver)
    clip = replace(clip, preset=find_preset(str(file)))
    check_resumed(clip, make, monkeypatch, stage, steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 6, 9])
def test_extrapolated_steps_and_reused_passes_go_on_too(
    tmp_path: Path,
    clip: Request,
    make: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    file = write_preset(tmp_path / "s.toml", draft_steps=12, highres_steps=4)
    options = replace(clip.options, step_cache=0.5, guidance_reuse=2)
    clip = replace(clip, preset=find_preset(str(file)), options=options)
    check_resumed(clip, make, monkeypatch, "draft", steps)
    if steps < 4:
        clip = replace(clip, out=clip.out.with_name("second"))
        check_resumed(clip, make, monkeypatch, "highres", steps)


def check_resumed(
    clip: Request,
    make: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    stage: StageName,
    steps: int,
) -> None:
    """Stop after some steps, go on, and compare with a clip that was never stopped."""
    whole = replace(clip, out=clip.out.with_name("whole"))
    if not whole.out.exists():
        make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_between(patch, stage, steps))
    done: dict[str, float] = {}
    advance = Step.advance

    def counted(step: Step, count: float = 1) -> None:
        done.setdefault(step.label.split()[0], 0.0)
        done[step.label.split()[0]] += count
        advance(step, count)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "advance", counted)
        told = make(clip)
    assert f"going on after step {steps} of" in told.text
    assert done[stage] == pytest.approx(clip.stages[stage].steps - steps)
    assert ("draft" in done) == (stage == "draft")
    assert result(clip.out) == result(whole.out)
    assert sorted(path.name for path in clip.out.iterdir()) == ["0.json", "0.mkv"]


def stop_between(monkeypatch: pytest.MonkeyPatch, stage: str, steps: int) -> StopRequest:
    """Ask for an end in a step, which may still finish."""
    stop, keep = StopRequest(), ClipLog.keep

    def asked(log: ClipLog, state: LoopState) -> None:
        if log.stage == stage and state.steps == steps:
            stop.request(1e6)
        keep(log, state)

    monkeypatch.setattr(ClipLog, "keep", asked)
    return stop


def test_steps_that_are_damaged_or_of_other_steps_are_told_and_not_used(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_between(patch, "highres", 2))
    file = clip.out / STEPS
    sound = file.read_bytes()
    other = bytearray(sound)
    other[-3] ^= 1
    for content in (bytes(other), sound[:-1], b""):
        file.write_bytes(content)
        told = make(replace(clip, out=copy_of(clip.out)))
        assert "cannot be used" in told.text
        assert "the highres stage begins anew" in told.text
        assert result(clip.out.with_name("copy")) == result(whole.out)
    file.write_bytes(sound)
    identity = ClipLog._identity
    monkeypatch.setattr(ClipLog, "_identity", lambda log: identity(log) | {"chunk": 7})
    told = make(clip)
    assert "is of other steps (chunk is 8192, wanted 7): not used" in told.text
    assert result(clip.out) == result(whole.out)


def copy_of(folder: Path) -> Path:
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def test_a_disk_that_refuses_the_steps_is_told_once_and_the_run_goes_on(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise WriteFailed(f"cannot write {path}", got="No space left on device")

    monkeypatch.setattr(journal_module, "write_steps", full)
    told = make(clip)
    assert told.text.count("the run goes on, and if it is ended, with less to go on from") == 1
    assert (clip.out / "0.mkv").exists()


@pytest.mark.slow
def test_a_decode_in_tiles_goes_on_at_the_next_tile(
    clip: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages before it are not planned again, its tiling is that of the run before."""
    decode = replace(clip.preset.decode, order="tiles", strips=4)
    assert clip.preset.highres is not None
    tall = replace(clip.preset.highres, height=960, width=64)
    low = replace(clip.preset.draft, height=480, width=32)
    clip = replace(clip, preset=replace(clip.preset, decode=decode, highres=tall, draft=low))
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_in(patch, "decode", share=2.5))
    assert (clip.out / "0.tiles").exists()
    told = make(clip)
    assert "of 4 tiles: going on" in told.text
    assert result(clip.out) == result(whole.out)


# ---- between two latent frames of the decode ---------------------------------------------------


@pytest.fixture
def longer(tmp_path: Path, clip: Request) -> Request:
    """Thirteen frames, made of four latent ones."""
    file = write_preset(tmp_path / "l.toml", frames=13, draft_steps=1, highres_steps=1)
    return replace(clip, preset=find_preset(str(file)))


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> StopRequest:
    """Ask for an end in a chunk of the decode, which may still finish."""
    stop, keep, kept = StopRequest(), FrameLog.keep, list[Tensor]()

    def asked(log: FrameLog, frames: Tensor, past: Past) -> None:
        kept.append(frames)
        if len(kept) == chunks:
            stop.request(1e6)
        keep(log, frames, past)

    monkeypatch.setattr(FrameLog, "keep", asked)
    return stop


@pytest.mark.parametrize("codec", ["ffv1", "h264"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_decode_in_frames_goes_on_after_the_last_chunk(
    longer: Request,
    make: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    codec: Literal["ffv1", "h264"],
    chunks: int,
) -> None:
    clip = replace(longer, options=replace(longer.options, codec=codec))
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(clip, stop_after(patch, chunks))
    assert (clip.out / FRAMES).exists()
    made, advance = list[float](), Step.advance

    def counted(step: Step, count: float = 1) -> None:
        made.append(count if step.label.startswith("decode") else 0)
        advance(step, count)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "advance", counted)
        told = make(clip)
    assert f"has {4 * chunks - 3} frames: going on after them" in told.text
    assert sum(made) == pytest.approx(4 * (4 - chunks))
    video = "0.mp4" if codec == "h264" else "0.mkv"
    assert (clip.out / video).read_bytes() == (whole.out / video).read_bytes()
    assert sorted(path.name for path in clip.out.iterdir()) == ["0.json", video]


def test_the_decode_verb_goes_on_with_the_frames_of_a_run(
    longer: Request,
    make: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    bundle_dir: Path,
) -> None:
    whole = replace(longer, out=longer.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(longer, stop_after(patch, 2))
    told = Told()
    finish([longer.out / LATENTS], open_bundle(bundle_dir), told, Overrides(device="cpu"))
    assert "has 5 frames: going on after them" in told.text
    assert (longer.out / "0.mkv").read_bytes() == (whole.out / "0.mkv").read_bytes()
    assert not (longer.out / FRAMES).exists()


def test_frames_that_are_damaged_or_of_another_decode_are_told_and_not_used(
    longer: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(longer, out=longer.out.with_name("whole"))
    make(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(longer, stop_after(patch, 2))
    file = longer.out / FRAMES
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[-3] ^= 1
    for content in (bytes(flipped), sound[:-1], b""):
        file.write_bytes(content)
        told = make(replace(longer, out=copy_of(longer.out)))
        assert "cannot be used" in told.text
        assert "the clip is decoded from the start" in told.text
        assert result(longer.out.with_name("copy")) == result(whole.out)
    file.write_bytes(sound)
    made_of = Run._made_of
    monkeypatch.setattr(Run, "_made_of", lambda *x: made_of(*x) | {"decoder": "another"})
    told = make(longer)
    assert "is of another decode (decoder is" in told.text
    assert result(longer.out) == result(whole.out)
    assert not file.exists()


def test_fresh_begins_the_decode_with_its_first_frame(
    longer: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(longer, stop_after(patch, 2))
    assert "going on after" not in make(replace(longer, fresh=True)).text
    assert not (longer.out / FRAMES).exists()


def test_a_disk_that_refuses_the_frames_is_told_once_and_the_clip_is_made(
    longer: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise WriteFailed(f"cannot write {path}", got="No space left on device")

    monkeypatch.setattr(frame_log, "write_tensors", full)
    monkeypatch.setattr(FrameLog, "_due", lambda log, size: not log.journal.refused)
    told = make(longer)
    assert told.text.count("the run goes on, and if it is ended, with less to go on from") == 1
    assert (longer.out / "0.mkv").exists()


def test_frames_are_not_kept_where_the_plan_leaves_no_memory(
    longer: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OomFallback, "spare_host", lambda *_: 1_000_000)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        make(longer, stop_after(patch, 2))
    assert not (longer.out / FRAMES).exists()
    make(longer)
    assert (longer.out / "0.mkv").exists()


def test_frames_are_written_no_more_often_than_the_journal_may_take_time(
    longer: Request, make: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(frame_log, "_write", lambda path, tensors, made_of: written.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(frame_log, "ASSUMED_RATE", 1)  # byte per second
        make(longer)
        assert written == []
    monkeypatch.setattr(frame_log, "ASSUMED_RATE", 2**60)
    monkeypatch.setattr(journal_module, "SHARE", 1e9)
    make(replace(longer, fresh=True))
    assert written
