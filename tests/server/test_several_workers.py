# SPDX-License-Identifier: Apache-2.0
"""Several devices: a job goes to a worker that it fits, and does not wait for one that is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pw_runtime.presets import PRESETS
from pw_runtime.server import maker
from pw_runtime.server.admission import Admission
from pw_runtime.server.messages import Fit, Join, Ready
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Store
from pw_runtime.server.supervisor import Supervisor
from pw_runtime.types import Budget, RunOptions
from tests.server.servers import serving
from tests.server.test_limits import new_job

WHOLE, DRAFT = Fit(fits=True, draft_fits=True), Fit(fits=False, draft_fits=True, reason="small")
NEITHER = Fit(fits=False, draft_fits=False, reason="tiny")


def supervisor(tmp_path: Path, *fits: Fit | None) -> Supervisor:
    """A supervisor with a worker for each fit of preset nano; None: it is not ready yet."""
    settings = Settings(model=tmp_path, root=tmp_path, presets={}, devices=("a", "b")[: len(fits)])
    made = Supervisor(settings, Store(tmp_path / "queue.sqlite"), lambda text: None)
    for worker, fit in zip(made.workers, fits, strict=True):
        if fit is not None:
            presets = {"nano": fit}
            worker.ready = Ready(device=worker.device, bundle="", presets=presets, rss=0)
    return made


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


@pytest.mark.parametrize(("named", "expected"), [(None, 50), (80, 80)])
def test_workers_divide_the_host_memory_that_is_free(
    named: int | None, expected: int, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[Budget] = []

    class Spy(Admission):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            budgets.append(self._budget)

    monkeypatch.setattr(maker, "Admission", Spy)
    free = 100 * 2**30 if named is None else named * 2**30
    monkeypatch.setattr(maker, "budget_of", lambda *given: Budget(host=free, device=None))
    join = Join(
        model=str(bundle_dir),
        presets={"nano": PRESETS["nano"]},
        options=RunOptions(device="cpu"),
        host_memory=None if named is None else named * 2**30,
        workers=2,
    )
    maker.Maker(join, lambda event: None)
    assert [budget.host for budget in budgets] == [expected * 2**30]
