# SPDX-License-Identifier: Apache-2.0
"""The queue and the job in hand survive kills of both processes, and restarts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Store
from pw_runtime.server.supervisor import Supervisor
from tests.server.servers import (
    FAKE_WORKER,
    PATIENCE,
    launch,
    python_path,
    running,
    serving,
    wait_until_ready,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_restart_the_running_job_goes_on_and_the_queue_is_whole(
    number: signal.Signals, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    with serving(root) as served:
        running_job = served.until_running(served.create("hold once", seed=1)["id"])
        waiting = [served.create(seed=i)["id"] for i in range(2, 5)]
        worker = served.worker()
        os.kill(served.process.pid, number)
        code = served.process.wait(PATIENCE)
        assert code == (128 + number if number == signal.SIGTERM else -number)
        assert _gone(worker)
    with serving(root) as served:
        for video_id in (running_job["id"], *waiting):
            assert served.until_ended(video_id)["status"] == "completed"
        listed = served.http.get("/v1/videos?order=asc").json()["data"]
        assert [video["id"] for video in listed] == [running_job["id"], *waiting]
        assert [video["seed"] for video in listed] == [1, 2, 3, 4]


def _gone(pid: int) -> bool:
    """Wait until a process is gone, or waits for its parent alone."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        subprocess.run(["sleep", "0.05"], check=True)
    return False


def test_a_killed_worker_is_replaced_and_its_job_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        video = served.until_running(served.create("hold once")["id"])
        before = served.worker()
        os.kill(before, signal.SIGKILL)
        assert served.until_ended(video["id"])["status"] == "completed"
        assert served.worker() != before
        assert "pw_worker_restarts_total 1.0" in served.http.get("/metrics").text


def test_a_job_that_kills_three_workers_fails_and_the_next_is_made(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        video = served.until_ended(served.create("die")["id"])
        assert video["error"]["code"] == "worker_died"
        assert "exit code 9" in video["error"]["message"]
        assert served.until_ended(served.create()["id"])["status"] == "completed"


def test_a_running_job_is_cancelled_and_its_draft_stays(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        video = served.until_running(served.create("hold", seed=3)["id"])
        ended = served.http.post(f"/v1/videos/{video['id']}/cancel").json()
        assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
        draft = served.http.get(f"/v1/videos/{video['id']}/content?variant=draft")
        assert draft.text == "draft of 3"
        assert not (tmp_path / "root" / "jobs" / video["id"] / "final").exists()
        again = served.http.post(f"/v1/videos/{video['id']}/cancel").json()
        assert again["error"]["code"] == "cancelled"
        done = served.until_ended(served.create()["id"])
        assert served.error("POST", f"/v1/videos/{done['id']}/cancel")[0] == 409


def test_a_draft_that_is_made_again_is_not_there_until_it_is_complete(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        created = served.create("redo")
        video = served.until(created["id"], lambda v: v["stage"] == "highres")
        video = served.until(video["id"], lambda v: not v["draft_ready"])
        path = f"/v1/videos/{video['id']}"
        assert served.error("GET", f"{path}/content?variant=draft")[1]["code"] == "not_ready"
        ended = served.http.post(f"{path}/cancel").json()
        assert (ended["error"]["code"], ended["draft_ready"]) == ("cancelled", False)
        assert not (tmp_path / "root" / "jobs" / video["id"] / "draft").exists()
        finish = {"draft_id": video["id"]}
        assert served.error("POST", "/v1/videos", json=finish)[1]["code"] == "draft_not_ready"


def test_a_waiting_job_is_cancelled_and_never_made(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        first = served.until_running(served.create("hold")["id"])
        second = served.create()
        assert second["queue_position"] == 0
        ended = served.http.post(f"/v1/videos/{second['id']}/cancel").json()
        assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
        served.http.post(f"/v1/videos/{first['id']}/cancel")
        assert served.until_ended(served.create()["id"])["status"] == "completed"
        assert served.video(second["id"])["status"] == "failed"


def test_a_deleted_job_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with serving(root) as served:
        video = served.until_running(served.create("hold")["id"])
        answer = served.http.delete(f"/v1/videos/{video['id']}").json()
        assert answer == {"id": video["id"], "object": "video.deleted", "deleted": True}
        assert served.error("GET", f"/v1/videos/{video['id']}")[0] == 404
        assert list((root / "jobs").iterdir()) == []
        assert served.until_ended(served.create()["id"])["status"] == "completed"


def test_higher_priorities_run_first_and_equal_ones_in_order(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        first = served.until_running(served.create("hold")["id"])
        low, high, higher = (served.create(priority=priority) for priority in (0, 5, 5))
        positions = [served.video(job["id"])["queue_position"] for job in (low, high, higher)]
        assert positions == [2, 0, 1]
        served.http.post(f"/v1/videos/{first['id']}/cancel")
        assert served.until_ended(low["id"])["status"] == "completed"
        assert all(served.video(job["id"])["status"] == "completed" for job in (high, higher))


def test_a_second_server_in_a_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with serving(root) as served:
        other = subprocess.run(
            launch(root), capture_output=True, text=True, env=python_path(), timeout=PATIENCE
        )
        assert other.returncode == 2
        assert "another run is writing" in other.stderr
        assert served.http.get("/ready").status_code == 200


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        command = launch(tmp_path / "other")
        command[2] = command[2].replace("port=0", f"port={served.url.rpartition(':')[2]}")
        other = subprocess.run(
            command, capture_output=True, text=True, env=python_path(), timeout=PATIENCE
        )
        assert other.returncode == 2
        assert "cannot listen on 127.0.0.1" in other.stderr


def test_without_the_model_a_server_does_not_start(tmp_path: Path) -> None:
    command = launch(tmp_path / "root", model=tmp_path / "absent")
    ended = subprocess.run(
        command, capture_output=True, text=True, env=python_path(), timeout=PATIENCE
    )
    assert ended.returncode == 2
    assert "is gone" in ended.stderr


def test_where_the_model_goes_away_jobs_wait_until_it_is_back(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with serving(tmp_path / "root") as served:
        shutil.move(model, tmp_path / "elsewhere")
        os.kill(served.worker(), signal.SIGKILL)
        while "is gone" not in (answer := served.http.get("/ready")).text:
            assert served.process.poll() is None
        assert answer.status_code == 503
        video = served.create()
        assert video["status"] == "queued"
        shutil.move(tmp_path / "elsewhere", model)
        assert served.until_ended(video["id"])["status"] == "completed"


def test_a_queue_of_another_version_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with sqlite3.connect(root / "queue.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    ended = subprocess.run(
        launch(root), capture_output=True, text=True, env=python_path(), timeout=PATIENCE
    )
    assert ended.returncode == 2
    assert "format 99" in ended.stderr


def test_a_damaged_queue_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "queue.sqlite").write_bytes(b"no database" * 1000)
    ended = subprocess.run(
        launch(root), capture_output=True, text=True, env=python_path(), timeout=PATIENCE
    )
    assert ended.returncode == 2
    assert "cannot be used" in ended.stderr


def test_folders_of_requests_that_were_never_accepted_go_at_the_next_start(
    tmp_path: Path,
) -> None:
    """A kill between the writing of a picture and the commit of its job; never a video."""
    root = tmp_path / "root"
    with serving(root) as served:
        kept = served.until_ended(served.create()["id"])["id"]
        served.end()
    for file in root.glob("queue.sqlite*"):  # as where it was damaged
        file.rename(tmp_path / file.name)
    lost, others = root / "jobs" / f"video_{0:032x}", root / "jobs" / "notes"
    for folder in (lost, others):
        folder.mkdir()
        (folder / "picture").write_text("a picture")
    with serving(root):
        assert {path.name for path in (root / "jobs").iterdir()} == {kept, "notes"}


def test_files_that_a_killed_removal_left_go_at_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with serving(root) as served:
        video = served.until_ended(served.create()["id"])
        served.process.kill()
        served.process.wait()
    with sqlite3.connect(root / "queue.sqlite") as database:
        database.execute("UPDATE jobs SET removing = 1")
    with running(launch(root)) as served:
        wait_until_ready(served)
        assert served.error("GET", f"/v1/videos/{video['id']}")[0] == 404
        assert list((root / "jobs").iterdir()) == []


def test_a_worker_that_is_told_to_end_while_it_is_started_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: it was waited for as long as one that does not end, and killed."""
    settings = Settings(
        model=tmp_path,
        root=tmp_path,
        presets={},
        grace_seconds=1e6,
        worker=(sys.executable, FAKE_WORKER),
    )
    supervisor = Supervisor(settings, Store(tmp_path / "queue.sqlite"), lambda text: None)
    (worker,) = supervisor.workers
    start = asyncio.create_subprocess_exec

    async def stopped_meanwhile(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*command, **options)
        worker.stop()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", stopped_meanwhile)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    asyncio.run(asyncio.wait_for(worker.run(), PATIENCE))
    assert worker.pid is None
