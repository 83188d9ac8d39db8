# SPDX-License-Identifier: Apache-2.0
"""A worker of several ranks makes the clips of one process, and says so when it loses one."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from pw_runtime import (
    Prompt,
    Reporter,
    Request,
    RunOptions,
    find_preset,
    generate,
    open_bundle,
    pipeline,
)
from pw_runtime.errors import BadRequest, RankFailed, WriteFailed
from pw_runtime.fleet import group as group_module
from pw_runtime.fleet.batch import make_batch
from pw_runtime.fleet.group import Group, GroupLost
from pw_runtime.fleet.messages import Ended, Event, Made, Order, Part
from pw_runtime.fleet.worker import Worker
from pw_runtime.system.ranks import Ranks
from tests.e2e.pw import write_preset

OPTIONS = RunOptions(
    device="cpu", precision="fp32", conv="onednn", policy="eager", codec="ffv1", chunk=16
)
PROMPTS = (Prompt("a cat", id="cat", position=4), Prompt("a dog", id="dog", position=7))
TOKEN = "0123"
PART = Part(model="none", options=OPTIONS)


@pytest.fixture
def order(tmp_path: Path) -> Request:
    """96x64 in the draft, 64x352 after it: high enough for two bands of the decode."""
    file = write_preset(tmp_path / "small.toml", strips=2)
    file.write_text(
        file.read_text().replace("width = 192\nheight = 96", "width = 64\nheight = 352")
    )
    return Request(
        prompts=PROMPTS,
        preset=find_preset(str(file)),
        out=tmp_path / "out",
        options=OPTIONS,
        host_memory=2**33,
    )


def staging_of(order: Request) -> str:
    """Make the staging folder of a driver, which a worker here sees."""
    staging = order.out / ".fleet"
    staging.mkdir(parents=True)
    (staging / "token").write_text(TOKEN)
    return str(staging)


@pytest.fixture
def worker(bundle_dir: Path, order: Request) -> Iterator[Worker]:
    """A worker of two ranks that has joined."""
    found = Worker("w0-abc", 2)
    digest = open_bundle(bundle_dir).digest
    joined = found.join(str(bundle_dir), digest, OPTIONS, staging_of(order), TOKEN)
    assert joined.machine["threads"] == 1
    assert joined.process_bytes > 2 * 2**26  # of both
    yield found
    found.leave()


def processes(worker: Worker) -> tuple[int, ...]:
    assert worker._group is not None
    return tuple(rank.pid for rank in worker._group._ranks)


def until_the_end(worker: Worker) -> tuple[list[str], Ended]:
    """Return the clips of a batch, and its end."""
    events = list[Event]()
    while not (events and isinstance(events[-1], Ended)):
        news = worker.events(60)
        assert news, "the worker says nothing any more"
        events += news
    return [event.prompt_id for event in events if isinstance(event, Made)], events[-1]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ranks_make_batch_after_batch_with_the_bytes_of_one_process(
    worker: Worker, bundle_dir: Path, order: Request, tmp_path: Path
) -> None:
    alone = replace(order, out=tmp_path / "alone")
    generate(alone, open_bundle(bundle_dir), Reporter(quiet=True))
    ranks = processes(worker)
    for prompt in PROMPTS:
        folder = Path(worker.start(replace(order, prompts=(prompt,))))
        assert until_the_end(worker) == ([prompt.id], Ended())
        name = f"{prompt.id}.mkv"
        assert (folder / name).read_bytes() == (alone.out / name).read_bytes()
        assert "2 ranks" in (folder / f"{prompt.id}.json").read_text()
    assert processes(worker) == ranks
    # One that dies between two batches is the end of the next one.
    os.kill(ranks[1], signal.SIGKILL)
    worker.start(order)
    made, ended = until_the_end(worker)
    assert (made, ended.lost, ended.bad_input) == ([], True, False)
    assert ended.error is not None
    assert ended.error.startswith("rank 1 was killed, or ended without a word")
    worker.leave()
    assert not any(map(is_running, ranks))


@pytest.mark.slow
def test_the_end_of_rank_0_is_told_by_another(worker: Worker, order: Request) -> None:
    ranks = processes(worker)
    worker.start(order)
    assert worker.events(60), "the first words of rank 0, in the middle of its work"
    os.kill(ranks[0], signal.SIGKILL)
    made, ended = until_the_end(worker)
    assert (made, ended.lost) == ([], True)
    assert "rank 0" in str(ended.error)
    worker.leave()
    assert not any(map(is_running, ranks))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes as Linux does")
def test_ranks_end_with_a_worker_that_is_killed_at_its_work(
    bundle_dir: Path, order: Request
) -> None:
    start_and_say = (
        "import pickle, sys; from pw_runtime.fleet.worker import Worker; "
        "request, *words = pickle.load(sys.stdin.buffer); worker = Worker('w0-abc', 2); "
        "worker.join(*words); worker.start(request); worker.events(60); "
        "print(*(rank.pid for rank in worker._group._ranks), flush=True); sys.stdin.read()"
    )
    words = (str(bundle_dir), open_bundle(bundle_dir).digest, OPTIONS, staging_of(order), TOKEN)
    program = (sys.executable, "-c", start_and_say)
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
        assert killed.stdin is not None
        assert killed.stdout is not None
        pickle.dump((order, *words), killed.stdin)
        killed.stdin.flush()
        ranks = [os.pidfd_open(int(word)) for word in killed.stdout.readline().split()]
        killed.kill()
        assert len(ranks) == 2
        for rank in ranks:
            assert select.select([rank], [], [], 30)[0], "a rank outlives its worker"
            os.close(rank)


@pytest.mark.parametrize(
    ("error", "text", "bad_input"),
    [
        (RankFailed("rank 1 was killed", do="see its log"), "rank 1 was killed", False),
        (BadRequest("this clip does not fit"), "this clip does not fit", True),
        (WriteFailed("the disk is full"), "the disk is full", False),
        (ValueError("nobody foresaw it"), "nobody foresaw it", False),
    ],
)
def test_whatever_breaks_a_batch_of_several_ranks_loses_them_bad_input_apart(
    error: Exception,
    text: str,
    bad_input: bool,
    bundle_dir: Path,
    order: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(*arguments: object, warm: None) -> None:
        raise error

    monkeypatch.setattr(pipeline, "generate", generate)
    batch = Order(request=order, out=order.out, shared=True)
    ranks = cast(Ranks, object())
    ended = make_batch(batch, open_bundle(bundle_dir), lambda event: None, ranks=ranks)
    assert text in str(ended.error)
    assert "see its log" not in str(ended.error)  # the driver knows what follows
    assert (ended.bad_input, ended.lost) == (bad_input, not bad_input)
    alone = make_batch(batch, open_bundle(bundle_dir), lambda event: None)
    assert (alone.bad_input, alone.lost) == (bad_input, False)


def test_a_rank_that_ends_before_it_has_joined_loses_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        group_module, "own_program", lambda module: (sys.executable, "-c", "raise SystemExit(7)")
    )
    group = Group(2, lambda event: None)
    with pytest.raises(GroupLost, match=r"rank 0 ended before it joined \(exit code 7\)"):
        group.join(PART)
    group.end()


def test_what_a_rank_cannot_do_is_raised_and_the_others_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuses = (
        "import os, pickle, sys, time; from pw_runtime.errors import BadRequest; "
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid())); "
        "pickle.load(sys.stdin.buffer); os.environ['RANK'] == '1' and time.sleep(600); "
        "pickle.dump(BadRequest('no such device'), sys.stdout.buffer)"
    )
    monkeypatch.setattr(group_module, "own_program", lambda module: (sys.executable, "-c", refuses))
    group = Group(2, lambda event: None)
    with pytest.raises(BadRequest, match="no such device"):
        group.join(PART)
    group.end()
    started = [int(path.read_text()) for path in tmp_path.iterdir() if path.read_text()]
    assert not any(map(is_running, started))
