# SPDX-License-Identifier: Apache-2.0
"""Bounds: of the queue, of a client, of a job's time, of what is kept; and a disk that refuses."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from pw_runtime.server.store import NewJob, Store
from tests.server.servers import serving


def test_a_full_queue_asks_clients_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path / "root", limits={"queued": 2}) as served:
        served.until_running(served.create("hold")["id"])
        served.create()
        answer = served.http.post("/v1/videos", json={"prompt": "a fox", "n": 2})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) > 0
        served.create()
        assert served.error("POST", "/v1/videos", json={"prompt": "a fox"})[0] == 429


def test_a_client_has_its_part_of_the_queue(tmp_path: Path) -> None:
    tokens = {"a" * 20: "anna", "b" * 20: "bert"}
    with serving(tmp_path / "root", tokens=tokens, limits={"queued_per_client": 1}) as served:
        served.until_running(served.create("hold")["id"])
        assert served.create()["client"] == "anna"
        assert served.error("POST", "/v1/videos", json={"prompt": "a fox"})[0] == 429
        served.http.headers["authorization"] = f"Bearer {'b' * 20}"
        assert served.create()["client"] == "bert"


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with serving(tmp_path / "root", limits={"job_seconds": 0.2}) as served:
        video = served.until_ended(served.create("hold")["id"])
        assert video["error"]["code"] == "timeout"
        assert "0.2 s" in video["error"]["message"]
        assert served.until_ended(served.create()["id"])["status"] == "completed"


def test_a_finished_job_says_when_it_expires_and_does(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with serving(root, limits={"keep_seconds": 3600}) as served:
        video = served.until_ended(served.create()["id"])
        assert video["expires_at"] == video["completed_at"] + 3600
        served.end()
    with serving(root, limits={"keep_seconds": 0}) as served:
        while served.http.get(f"/v1/videos/{video['id']}").status_code != 404:
            assert served.process.poll() is None
        assert list((root / "jobs").iterdir()) == []


def test_the_oldest_go_where_all_take_too_much(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with serving(root) as served:
        videos = [served.until_ended(served.create(seed=i)["id"]) for i in range(3)]
        served.end()
    size = sum(p.lstat().st_blocks * 512 for p in (root / "jobs" / videos[0]["id"]).rglob("*"))
    with serving(root, limits={"keep_bytes": 2 * size}) as served:
        while served.http.get(f"/v1/videos/{videos[0]['id']}").status_code != 404:
            assert served.process.poll() is None
        assert {v["id"] for v in served.http.get("/v1/videos").json()["data"]} == {
            *(video["id"] for video in videos[1:]),
        }


def new_job(number: int) -> NewJob:
    return NewJob(
        id=f"video_{number:032x}",
        client="anna",
        prompt="a fox",
        negative="",
        seed=0,
        preset_name="nano",
        preset={},
        draft_only=False,
        draft_id=None,
        draft_ready=False,
        priority=0,
        siblings=[],
        key=None,
        fingerprint="",
        picture=None,
    )


def test_jobs_keep_their_order_when_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "queue.sqlite")
    for number, now in enumerate((2e9, 1e9, 1.5e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        store.add([new_job(number)], most=9, most_of_client=9)
    listed = store.page(after=None, limit=9, newest_first=True)
    assert [job.created_at for job in listed] == [1_500_000_000, 1_000_000_000, 2_000_000_000]
    claimed = [store.claim() for _ in range(4)]
    assert [job and job.id for job in claimed] == [*(new_job(i).id for i in range(3)), None]
    store.close()


def test_a_disk_that_refuses_the_queue_is_told_and_jobs_are_taken_again(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    with serving(tmp_path / "root") as served:
        served.until_ended(served.create()["id"])
        pid = served.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        status, error = served.error("POST", "/v1/videos", json={"prompt": "a fox"})
        assert (status, error["code"]) == (503, "storage_unavailable")
        assert served.http.get("/v1/videos").status_code == 200
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        assert served.until_ended(served.create()["id"])["status"] == "completed"


def test_a_disk_that_refuses_in_the_midst_of_a_job_is_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        video = served.until_running(served.create("hold once")["id"])
        pid = served.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        os.kill(served.worker(), signal.SIGKILL)
        while not any("waiting until the queue" in line for line in served.lines):
            assert served.process.poll() is None
        assert served.video(video["id"])["status"] == "in_progress"
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        assert served.until_ended(video["id"])["status"] == "completed"


def test_a_worker_that_does_not_hear_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "root", hang_seconds=0.1) as served:
        video = served.until_running(served.create("hold deaf")["id"])
        ended = served.http.post(f"/v1/videos/{video['id']}/cancel").json()
        assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
        assert served.until_ended(served.create()["id"])["status"] == "completed"


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with serving(root) as served:
        served.until_ended(served.create()["id"])
        assert root.stat().st_mode & 0o777 == 0o700
        modes = [os.lstat(root / name).st_mode & 0o077 for name in ("queue.sqlite", "jobs")]
        assert modes == [0, 0]
