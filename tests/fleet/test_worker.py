# SPDX-License-Identifier: Apache-2.0
"""A worker makes the clips of one `pw generate`, keeps its networks, and answers for itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pw_runtime import (
    LoraFile,
    Prompt,
    Reporter,
    Request,
    RunOptions,
    find_preset,
    generate,
    open_bundle,
    pipeline,
)
from pw_runtime.errors import BadRequest, BadResult
from pw_runtime.fleet import worker as worker_module
from pw_runtime.fleet.messages import Ended, Event, Failed, Joined, Kept, Made, StagedFile, Warned
from pw_runtime.fleet.worker import Worker
from pw_runtime.job import networks as networks_module
from tests.convert.loras import random_pairs, tensors_in, with_lora, write_lora
from tests.e2e.pw import write_preset

OPTIONS = RunOptions(device="cpu", precision="fp32", conv="onednn", policy="eager", codec="ffv1")
PROMPTS = (Prompt("a cat", id="cat", position=4), Prompt("a dog", id="dog", position=7))
TOKEN = "0123"


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    """The staging folder of a driver, which a worker here sees."""
    folder = tmp_path / "out" / ".fleet"
    folder.mkdir(parents=True)
    (folder / "token").write_text(TOKEN)
    return folder


@pytest.fixture
def order(tmp_path: Path) -> Request:
    return Request(
        prompts=PROMPTS,
        preset=find_preset(str(write_preset(tmp_path / "small.toml"))),
        out=tmp_path / "out",
        options=OPTIONS,
        host_memory=2**33,
    )


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker("w0-abc")
    yield found
    found.leave()


def join(worker: Worker, bundle: Path, staging: Path, token: str = TOKEN) -> Joined:
    digest = open_bundle(bundle).digest
    return worker.join(str(bundle), digest, OPTIONS, str(staging), token)


def made_by(worker: Worker, request: Request) -> tuple[Path, list[Event]]:
    """Make a batch; return its folder and all that was told."""
    folder, events = worker.start(request), list[Event]()
    while not any(isinstance(event, Ended) for event in events):
        news = worker.events(60)
        assert news, "the worker says nothing any more"
        events += news
    return Path(folder), events


def of(kind: type[Any], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def read(worker: Worker, file: StagedFile) -> bytes:
    content = b""
    while len(content) < file.bytes:
        content += worker.read(file.name, len(content))
    return content


def test_its_clips_are_those_of_one_run_over_all_prompts(
    worker: Worker, bundle_dir: Path, staging: Path, order: Request, tmp_path: Path
) -> None:
    assert join(worker, bundle_dir, staging).shares_output
    folder, events = made_by(worker, order)
    assert folder == staging / "w0-abc" / "1"
    assert of(Ended, events) == [Ended()]
    made = of(Made, events)
    assert [clip.prompt_id for clip in made] == ["cat", "dog"]
    assert [file.name for file in made[0].files] == ["cat.json", "cat.mkv"]
    alone = replace(order, out=tmp_path / "alone")
    generate(alone, open_bundle(bundle_dir), Reporter(quiet=True))
    for name in ("cat.mkv", "dog.mkv"):
        assert (folder / name).read_bytes() == (alone.out / name).read_bytes()


def test_its_next_batch_has_a_new_folder_and_loads_nothing(
    worker: Worker,
    bundle_dir: Path,
    staging: Path,
    order: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join(worker, bundle_dir, staging)
    first, _ = made_by(worker, replace(order, prompts=PROMPTS[:1]))
    for name in ("load_text_network", "load_transformer", "load_decoder"):
        monkeypatch.delattr(networks_module, name)
    second, events = made_by(worker, replace(order, prompts=PROMPTS[1:]))
    assert [clip.prompt_id for clip in of(Made, events)] == ["dog"]
    assert first != second
    assert not first.exists()


def test_where_it_does_not_see_the_output_its_files_are_read_in_pieces(
    worker: Worker,
    bundle_dir: Path,
    staging: Path,
    order: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "PIECE_BYTES", 1000)
    assert not join(worker, bundle_dir, staging, token="another").shares_output
    folder, events = made_by(worker, replace(order, prompts=PROMPTS[:1]))
    assert staging not in folder.parents
    (clip,) = of(Made, events)
    for file in clip.files:
        assert read(worker, file) == (folder / file.name).read_bytes()
        assert len(file.sha256) == 64
    worker.leave()
    assert not folder.exists()


def test_a_prompt_that_fails_leaves_its_latents_and_the_others_are_made(
    worker: Worker,
    bundle_dir: Path,
    staging: Path,
    order: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = pipeline.decode_clip

    def decode_dogs_only(vae: Any, run: Any, clip: Any, step: Any) -> None:
        if clip.prompt.id == "cat":
            raise BadResult("no picture")
        decode(vae, run, clip, step)

    monkeypatch.setattr(pipeline, "decode_clip", decode_dogs_only)
    join(worker, bundle_dir, staging)
    folder, events = made_by(worker, order)
    assert of(Failed, events) == [Failed("cat", "no picture")]
    assert [clip.prompt_id for clip in of(Made, events)] == ["dog"]
    (kept,) = of(Kept, events)
    assert [file.name for file in kept.files] == ["cat.latents.safetensors"]
    told = "\n".join(event.text for event in of(Warned, events))
    assert f"pw decode {order.out}/cat.latents.safetensors" in told  # where it will be
    assert str(folder) not in told


def test_a_request_that_cannot_work_ends_the_batch_as_bad_input(
    worker: Worker, bundle_dir: Path, staging: Path, order: Request
) -> None:
    join(worker, bundle_dir, staging)
    _, events = made_by(worker, replace(order, host_memory=2**20))
    (ended,) = of(Ended, events)
    assert ended.bad_input
    assert "does not fit into memory" in ended.error


def test_an_error_that_nobody_foresaw_ends_the_batch_with_its_traceback(
    worker: Worker,
    bundle_dir: Path,
    staging: Path,
    order: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join(worker, bundle_dir, staging)
    monkeypatch.delattr(pipeline, "generate")
    _, events = made_by(worker, order)
    (ended,) = of(Ended, events)
    assert not ended.bad_input
    assert "ImportError" in ended.error


def test_a_worker_that_leaves_before_it_joined_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("precious")
    monkeypatch.chdir(tmp_path)
    Worker("w0-abc").leave()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_bundle_that_is_not_there_or_another_one_is_named_with_the_worker(
    worker: Worker, bundle_dir: Path, staging: Path, tmp_path: Path
) -> None:
    digest = open_bundle(bundle_dir).digest
    with pytest.raises(BadRequest, match=r"worker w0-abc on .*: the bundle .* cannot be seen"):
        worker.join(str(tmp_path / "none"), digest, OPTIONS, str(staging), TOKEN)
    with pytest.raises(BadRequest, match="is another one than the driver's"):
        worker.join(str(bundle_dir), "f" * 64, OPTIONS, str(staging), TOKEN)


def test_a_worker_takes_the_loras_of_the_driver_and_no_others(
    worker: Worker, bundle_dir: Path, staging: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(bundle_dir)
    file = write_lora(tmp_path / "l.safetensors", tensors_in("ComfyUI", random_pairs(bundle)))
    digest = with_lora(bundle, LoraFile(file, 0.5)).weights_digest
    common = (str(bundle_dir), digest, OPTIONS, str(staging), TOKEN)
    joined = worker.join(*common, loras={"draft": (LoraFile(file, 0.5),)})
    assert joined.shares_output
    for loras, words in (
        ({"draft": (LoraFile(file, 0.25),)}, "a LoRA is another one than the driver's"),
        ({}, "a LoRA is another one than the driver's"),
        ({"draft": (LoraFile(tmp_path / "none"),)}, r"worker w0-abc on .* cannot be read"),
    ):
        with pytest.raises(BadRequest, match=words):
            worker.join(*common, loras=loras)


def test_a_device_that_is_not_there_is_named_with_the_worker(
    worker: Worker, bundle_dir: Path, staging: Path
) -> None:
    options = replace(OPTIONS, device="tpu!")
    with pytest.raises(BadRequest, match=r"worker w0-abc on .*: unknown device"):
        worker.join(str(bundle_dir), open_bundle(bundle_dir).digest, options, str(staging), TOKEN)
