# SPDX-License-Identifier: Apache-2.0
"""Whatever becomes of the workers, every clip is there once and as it would be without a fault."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pw_runtime import Prompt, Reporter, Request, RunOptions, find_preset, open_bundle
from pw_runtime.errors import BadRequest
from pw_runtime.fleet.layout import Layout, Node
from pw_runtime.fleet.run import run_fleet
from pw_runtime.job.checks import check_content
from pw_runtime.types import Outcome
from tests.fleet.simulated import Decide, Fate, SimulatedCluster, video_of
from tests.inputs.videos import shades, write_video

WORKERS = 3


class Words(Reporter):
    """Keeps what the driver says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.videos: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    warn = say

    def finished(self, path: Path) -> None:
        self.videos.append(path.name)

    def has(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[[int], Request]:
    def make(prompts: int) -> Request:
        return Request(
            prompts=tuple(Prompt(f"clip {i}", id=str(i), position=i + 1) for i in range(prompts)),
            preset=find_preset("nano"),
            out=tmp_path / "out",
            options=RunOptions(device="cpu", precision="fp32", conv="onednn"),
        )

    return make


Run = Callable[..., tuple[Outcome, ...]]


@pytest.fixture
def run(bundle_dir: Path, words: Words) -> Run:
    bundle = open_bundle(bundle_dir)

    def start(
        request: Request,
        cluster: SimulatedCluster,
        ending: Callable[[], bool] = lambda: False,
        workers: int = WORKERS,
    ) -> tuple[Outcome, ...]:
        node = Node(name="here", cpus=workers, gpus=0, memory_bytes=2**34)
        layout = Layout(gpus=0, cpus=1, places=((node, workers),))
        return run_fleet(request, bundle, words, cluster, layout, ending)

    return start


@pytest.mark.parametrize("save_latents", [False, True])
def test_nothing_of_a_begun_clip_stays_beside_the_finished_one(
    run: Run, request_for: Callable[[int], Request], save_latents: bool
) -> None:
    request = request_for(1)
    request = replace(request, options=replace(request.options, save_latents=save_latents))
    begun = ["0.steps.safetensors", "0.frames.safetensors", "0.tiles", "0.tiles.state"]
    request.out.mkdir()
    for name in begun:
        (request.out / name).touch()
    run(request, SimulatedCluster())
    assert sorted(path.name for path in request.out.iterdir()) == ["0.json", "0.mp4"]


def only_once(fate: Fate, *ids: str) -> Decide:
    """A fate that each of these prompts meets at its first try."""
    met: set[str] = set()
    lock = threading.Lock()

    def decide(worker: str, prompt: Prompt) -> Fate:
        with lock:
            if prompt.id in ids and prompt.id not in met:
                met.add(prompt.id)
                return fate
        return "made"

    return decide


def videos(request: Request) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in request.out.glob("*.mp4")}


def expected(request: Request) -> dict[str, bytes]:
    return {f"{prompt.id}.mp4": video_of(prompt) for prompt in request.prompts}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "decide",
    [
        lambda worker, prompt: "made",
        only_once("dies", "3", "11", "12"),
        only_once("loses a rank", "5", "29"),
        only_once("fails", "0", "7"),
        lambda worker, prompt: "fails" if worker == "w1" else "made",
        lambda worker, prompt: "dies" if worker == "w2" else "made",
    ],
    ids=[
        "without a fault",
        "nodes die",
        "ranks die",
        "prompts fail once",
        "a broken GPU",
        "a broken node",
    ],
)
def test_every_clip_is_there_once(
    run: Run,
    request_for: Callable[[int], Request],
    words: Words,
    decide: Decide,
    shared: bool,
) -> None:
    request = request_for(30)
    outcomes = run(request, SimulatedCluster(decide, shared=shared))
    assert [outcome.prompt for outcome in outcomes] == list(request.prompts)
    assert [outcome.error for outcome in outcomes] == [None] * 30
    assert videos(request) == expected(request)
    assert sorted(words.videos) == sorted(expected(request))  # told once each
    assert {path.suffix for path in request.out.iterdir()} == {".mp4", ".json"}


def test_all_workers_get_the_same_memory_and_options(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    cluster = SimulatedCluster()
    run(request_for(9), cluster)
    found = {(r.host_memory, r.gpu_memory, r.options, r.seed) for r in cluster.requests}
    assert len(found) == 1
    assert next(iter(found))[0] == 2**34 // WORKERS + 2**28


def test_batches_are_parts_of_a_list_whose_options_may_concern_other_prompts(
    run: Run, request_for: Callable[[int], Request], tmp_path: Path
) -> None:
    request = request_for(9)
    options = replace(request.options, draft_strength=0.8)
    file = tmp_path / "grey.mkv"
    write_video(file, shades(17))
    video = replace(request.prompts[0], draft_video=file)
    cluster = SimulatedCluster()
    run(replace(request, options=options, prompts=(video, *request.prompts[1:])), cluster)
    for batch in cluster.requests:
        check_content(batch)
    plain = [batch for batch in cluster.requests if video not in batch.prompts]
    assert plain
    with pytest.raises(BadRequest, match="no clip has one"):
        check_content(replace(plain[0], partial=False))


def test_a_prompt_that_always_fails_fails_alone_after_two_tries(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    request = request_for(8)
    cluster = SimulatedCluster(lambda worker, prompt: "fails" if prompt.id == "5" else "made")
    outcomes = run(request, cluster)
    assert {o.prompt.id: o.error for o in outcomes if o.error} == {"5": "no luck"}
    assert cluster.tries["5"] == 2
    assert len(videos(request)) == 7


def test_a_prompt_that_kills_its_workers_fails_after_three(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    request = request_for(8)
    cluster = SimulatedCluster(lambda worker, prompt: "dies" if prompt.id == "5" else "made")
    outcomes = run(request, cluster)
    (failed,) = [outcome for outcome in outcomes if outcome.error]
    assert failed.prompt.id == "5"
    assert failed.error == ("3 workers died while they made it, the last one: the node died")
    assert len(videos(request)) == 7


def test_where_every_worker_dies_the_run_ends_and_the_rest_has_no_outcome(
    run: Run, request_for: Callable[[int], Request], words: Words
) -> None:
    made = {"0", "1"}

    def decide(worker: str, prompt: Prompt) -> Fate:
        return "made" if prompt.id in made else "dies"

    outcomes = run(request_for(20), SimulatedCluster(decide))
    assert {outcome.prompt.id for outcome in outcomes if outcome.video} <= made
    assert len(outcomes) < 20
    assert words.has("is given up: 3 times in a row it ended without a clip")


def test_draining_finishes_what_runs_and_begins_nothing(
    run: Run, request_for: Callable[[int], Request], words: Words
) -> None:
    request, cluster = request_for(24), SimulatedCluster()
    cluster.may_finish.clear()

    def ending() -> bool:
        if not cluster.began.is_set():
            return False
        if words.has("no further prompt is begun"):
            cluster.may_finish.set()
        return True

    outcomes = run(request, cluster, ending, workers=1)
    (begun,) = cluster.batches
    assert [outcome.prompt.id for outcome in outcomes] == begun
    assert all(outcome.video is not None for outcome in outcomes)
    assert len(videos(request)) == len(begun) < 24


def test_a_second_signal_ends_the_workers_at_once(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    request, cluster = request_for(24), SimulatedCluster()
    cluster.may_finish.clear()

    def ending() -> bool:
        if cluster.began.is_set():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(request, cluster, ending)
    assert list(request.out.iterdir()) == []


def test_a_worker_that_cannot_see_the_bundle_ends_the_run_before_it_begins(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    cluster = SimulatedCluster(
        refuses=lambda worker: "the bundle cannot be seen" if worker == "w1" else None
    )
    with pytest.raises(BadRequest, match="the bundle cannot be seen"):
        run(request_for(5), cluster)
    assert cluster.batches == []


@pytest.mark.parametrize("name", ["pixelwizard-runtime", "torch"])
def test_a_worker_of_another_version_ends_the_run_before_it_begins(
    run: Run, request_for: Callable[[int], Request], name: str
) -> None:
    cluster = SimulatedCluster(version=lambda worker: {name: "0.0.1"} if worker == "w1" else {})
    with pytest.raises(BadRequest, match="install the same version"):
        run(request_for(5), cluster)
    assert cluster.batches == []


def test_a_request_that_no_worker_can_make_is_one_error(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    cluster = SimulatedCluster(lambda worker, prompt: "bad input")
    with pytest.raises(BadRequest, match="does not fit into memory"):
        run(request_for(30), cluster)
    assert len(cluster.batches) <= WORKERS


def test_a_worker_that_cannot_make_what_others_can_is_left_out(
    run: Run, request_for: Callable[[int], Request], words: Words
) -> None:
    request = request_for(30)
    cluster = SimulatedCluster(lambda worker, prompt: "bad input" if worker == "w0" else "made")
    run(request, cluster)
    assert videos(request) == expected(request)
    assert words.has("worker w0 on here: not used any more")


def test_files_of_an_earlier_run_are_refused_before_a_worker_starts(
    run: Run, request_for: Callable[[int], Request]
) -> None:
    request, cluster = request_for(3), SimulatedCluster()
    request.out.mkdir()
    (request.out / "1.mp4").write_bytes(b"")
    with pytest.raises(BadRequest, match="contains files of an earlier run"):
        run(request, cluster)
    assert cluster.started == []
