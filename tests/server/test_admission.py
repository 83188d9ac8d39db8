# SPDX-License-Identifier: Apache-2.0
"""The planner's word on presets, and what finished jobs are removed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pw_export.wan22_configs import NETWORKS
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest
from pw_runtime.planning import workload
from pw_runtime.planning.time_estimate import KNOWN
from pw_runtime.presets import PRESETS
from pw_runtime.server.admission import Admission
from pw_runtime.server.retention import expired
from pw_runtime.server.settings import Limits
from pw_runtime.server.store import Job
from pw_runtime.types import Budget, RunOptions
from tests.server.test_limits import new_job

GIB = 2**30


def admission(host: int, device: int) -> Admission:
    bundle = cast(Bundle, SimpleNamespace(networks=NETWORKS, loras={}))
    options = RunOptions(device="cpu", precision="bf16")
    budget = Budget(host=host * GIB, device=device * GIB)
    return Admission(bundle, options, budget, KNOWN["H200"])


def test_a_preset_that_fits_has_the_time_of_each_stage() -> None:
    fit = admission(host=64, device=80).fits({"2k": PRESETS["2k"]})["2k"]
    assert (fit.fits, fit.draft_fits, fit.reason) == (True, True, "")
    assert set(fit.seconds) == {"draft", "highres", "decode"}
    assert all(seconds > 0 for seconds in fit.seconds.values())


def test_a_preset_that_does_not_fit_says_what_would_do() -> None:
    small = admission(host=16, device=8)
    fits = small.fits({name: PRESETS[name] for name in ("draft", "4k")})
    assert not fits["4k"].fits
    assert "does not fit into memory" in fits["4k"].reason
    assert fits["4k"].draft_fits == fits["draft"].fits
    with pytest.raises(BadRequest, match="does not fit into memory"):
        small.kept(PRESETS["4k"], draft_only=False)


def test_what_stays_loaded_is_that_of_the_whole_clip() -> None:
    large = admission(host=64, device=80)
    everything = {"text", "draft", "highres", "decode"}
    assert large.kept(PRESETS["2k"], draft_only=False) == everything
    assert large.kept(PRESETS["2k"], draft_only=True) == everything - {"highres"}


def test_networks_that_jobs_keep_loaded_are_no_part_of_what_the_worker_itself_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen: a job was refused by the memory of the network that it would have used again."""
    large = admission(host=64, device=80)
    monkeypatch.setattr(workload, "rss_bytes", lambda: 63 * GIB)
    assert large.kept(PRESETS["2k"], draft_only=False) == {"text", "draft", "highres", "decode"}


def finished(number: int, completed_at: int, size: int) -> Job:
    state: dict[str, Any] = {
        "seq": number,
        "status": "completed",
        "created_at": 0,
        "started_at": 0,
        "completed_at": completed_at,
        "deaths": 0,
        "error_code": None,
        "error_message": None,
        "bytes": size,
        "removing": False,
    }
    return Job(**asdict(new_job(number)), **state)


@pytest.mark.parametrize(
    ("limits", "gone"),
    [
        (Limits(), []),
        (Limits(keep_seconds=50), [2, 1]),
        (Limits(keep_bytes=30), [2, 1]),
        (Limits(keep_bytes=40), [2]),
        (Limits(keep_seconds=1000, keep_bytes=5), [2, 1, 3, 4]),
    ],
)
def test_the_oldest_finished_jobs_are_removed_first(limits: Limits, gone: list[int]) -> None:
    jobs = [finished(1, 40, 10), finished(2, 30, 10), finished(3, 60, 10), finished(4, 90, 20)]
    assert [job.seq for job in expired(jobs, limits, now=100)] == gone


def test_files_of_links_count_for_their_job(tmp_path: Path) -> None:
    from pw_runtime.server import files

    source, target = (f"video_{i:032x}" for i in range(2))
    draft = files.folder_of(tmp_path, source) / "draft"
    draft.mkdir(parents=True)
    for name in ("0.mp4", "0.json", files.LATENTS, f"../{files.THUMBNAIL}"):
        (draft / name).write_text(name)
    assert files.adopt_draft(tmp_path, source, target)
    files.remove(tmp_path, source)
    kept = files.folder_of(tmp_path, target) / "draft" / "0.mp4"
    assert kept.read_text() == "0.mp4"
    assert files.size_of(tmp_path, target) > 0
    assert not files.adopt_draft(tmp_path, source, f"video_{2:032x}")
    assert not files.folder_of(tmp_path, f"video_{2:032x}").exists()
