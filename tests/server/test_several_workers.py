# SPDX-License-Identifier: Apache-2.0
"""Several devices: a job goes to a worker that it fits, and does not wait for one that is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pw_runtime.server import settings
from pw_runtime.server.messages import Fit, Ready
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Store
from pw_runtime.server.supervisor import Supervisor
from tests.server.servers import serving
from tests.server.test_limits import new_job

WHOLE, DRAFT = Fit(fits=True, draft_fits=True), Fit(fits=False, draft_fits=True, reason="small")
NEITHER = Fit(fits=False, draft_fits=False, reason="tiny")


def supervisor(tmp_path: Path, *fits: Fit | None) -> Supervisor:
    """A supervisor with a worker for each fit of preset nano; None: it is not ready yet."""
    devices = ("a", "b")[: len(fits)]
    given = Settings(model=tmp_path, root=tmp_path, presets={}, devices=devices)
    made = Supervisor(given, Store(tmp_path / "queue.sqlite"), lambda text: None)
    for worker, fit in zip(made.workers, fits, strict=True):
        if fit is not None:
            presets = {"nano": fit}
            worker.ready = Ready(device=worker.device, bundle="", presets=presets, rss=0)
    return made


def mute_device(tmp_path: Path, device: str) -> Path:
    """Let the fake worker of a device say nothing from its next start on, while a file is there."""
    file = tmp_path / "model" / device
    file.parent.mkdir(exist_ok=True)
    file.touch()
    return file


def test_a_job_waits_for_the_worker_that_it_fits(tmp_path: Path) -> None:
    with serving(tmp_path / "root", devices=["small", "large"]) as served:
        first = served.until_running(served.create("hold", preset="4k")["id"])
        second = served.create(preset="4k")
        assert served.until_ended(served.create(preset="2k")["id"])["status"] == "completed"
        assert served.video(second["id"])["status"] == "queued"
        served.http.post(f"/v1/videos/{first['id']}/cancel")
        assert served.until_ended(second["id"])["status"] == "completed"


@pytest.mark.parametrize(
    ("mine", "other", "taken"),
    [
        (WHOLE, DRAFT, True),
        (DRAFT, WHOLE, False),
        (DRAFT, None, False),  # it is starting: it may fit
        (DRAFT, DRAFT, True),  # the job fails, and says why
    ],
)
def test_what_fits_no_worker_is_left_to_none(
    mine: Fit, other: Fit | None, taken: bool, tmp_path: Path
) -> None:
    made = supervisor(tmp_path, mine, other)

    async def claimed() -> bool:
        await made.submit([new_job(1)])
        return await made.next_job(made.workers[0]) is not None

    assert asyncio.run(claimed()) is taken


def test_a_preset_fits_as_far_as_it_fits_any_worker(tmp_path: Path) -> None:
    for fits in ((NEITHER, DRAFT), (DRAFT, NEITHER)):
        assert supervisor(tmp_path, *fits).fits["nano"] == DRAFT
    for fits in ((WHOLE, DRAFT), (NEITHER, WHOLE), (WHOLE, None)):
        assert supervisor(tmp_path, *fits).fits["nano"] == WHOLE


@pytest.mark.parametrize("mine", [DRAFT, NEITHER])
def test_what_may_fit_a_worker_that_starts_is_not_refused(mine: Fit, tmp_path: Path) -> None:
    made = supervisor(tmp_path, mine, None)
    assert "nano" not in made.fits
    made.workers[1].refusal = "it has no GPU"
    assert made.fits["nano"] == mine


def test_the_job_of_a_worker_that_died_is_offered_to_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = supervisor(tmp_path, WHOLE, WHOLE)
    dead, other = made.workers
    woken: list[str] = []

    async def dies() -> None:
        await made.submit([new_job(1)])
        job = await made.next_job(dead)
        dead.ready = None
        monkeypatch.setattr(other, "wake", lambda: woken.append(other.device))
        await made.died(job, dead, "signal SIGKILL")
        again = await made.next_job(other)
        assert job is not None
        assert again is not None
        assert again.id == job.id

    asyncio.run(dies())
    assert woken == ["b"]


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_device_is_waited_for_until_a_start_ends_without_a_word(
    was_ready: bool, tmp_path: Path
) -> None:
    if not was_ready:
        mute_device(tmp_path, "large")
    with serving(tmp_path / "root", devices=["small", "large"]) as served:
        if was_ready:
            made = served.until_ended(served.create(preset="4k")["id"])
            assert made["status"] == "completed"
            mute_device(tmp_path, "large")
            served.restart_second_worker()
        video = served.create(preset="4k")
        assert served.until_ended(served.create(preset="2k")["id"])["status"] == "completed"
        assert served.video(video["id"])["status"] == "queued"
        served.restart_second_worker()
        assert served.until_ended(video["id"])["error"]["message"] == "4k is too large"
        refused = {"prompt": "a fox", "preset": "4k"}
        status, error = served.error("POST", "/v1/videos", json=refused)
        assert (status, error["code"]) == (400, "does_not_fit")


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("large", "now also ready for jobs: 4k"),
        ("tiny", "preset 4k does not fit: 4k is too large"),
    ],
)
def test_whether_a_preset_fits_is_told_when_it_is_known(
    device: str, told: str, tmp_path: Path
) -> None:
    mute = mute_device(tmp_path, device)
    with serving(tmp_path / "root", devices=["small", device]) as served:
        served.until_said("not known until every device is ready: 4k")
        mute.unlink()
        served.restart_second_worker()
        served.until_said(told)


@pytest.mark.parametrize("named", [None, 2**30])
def test_a_worker_that_is_started_again_has_the_same_part_of_the_host_memory(
    named: int | None, tmp_path: Path
) -> None:
    with serving(tmp_path / "root", devices=["a", "b"], host_memory=named) as served:
        joins = tmp_path / "model" / "joins"
        served.wait_for(lambda: len(joins.read_text().split()) == 2)
        served.restart_second_worker()
        served.wait_for(lambda: len(joins.read_text().split()) == 3)
    (part,) = set(joins.read_text().split())
    assert int(part) > 0
    assert named in (None, int(part))


@pytest.mark.parametrize(
    ("named", "devices", "expected"),
    [(None, ("a", "b"), 50), (80, ("a", "b"), 80), (None, ("a",), None)],
)
def test_workers_divide_the_host_memory_that_is_free(
    named: int | None,
    devices: tuple[str, ...],
    expected: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "available_memory_bytes", lambda: 100)
    given = Settings(model=tmp_path, root=tmp_path, presets={}, devices=devices, host_memory=named)
    assert settings.with_host_memory(given).host_memory == expected
