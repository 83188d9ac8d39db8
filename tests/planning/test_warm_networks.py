# SPDX-License-Identifier: Apache-2.0
"""Networks stay loaded between the runs of one process as far as the budget allows, and change
no bit of a clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pw_export.wan22_configs import NETWORKS
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
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.execution.step_replay import StepReplay
from pw_runtime.job import networks as networks_module
from pw_runtime.planning.candidates import candidates
from pw_runtime.planning.oom_fallback import LazyNetwork, OomFallback, plan_run
from pw_runtime.planning.planner import GIB, make_plan
from pw_runtime.planning.warm_networks import (
    PLACES,
    WarmNetworks,
    bytes_beside,
    kept_bytes,
    loading_options,
    stages_to_keep,
)
from pw_runtime.presets import PRESETS
from pw_runtime.system.step import Step
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import Budget, Network, RunPlan
from tests.e2e.pw import write_preset
from tests.planning.test_planner import work_for

CPU = torch.device("cpu")


class Words(Reporter):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say


Make = Callable[[str, WarmNetworks | None], list[str]]


@pytest.fixture
def make(bundle_dir: Path, tmp_path: Path) -> Make:
    """Make one clip, with prompt "a cat", into a folder of that name; return what was said."""
    bundle = open_bundle(bundle_dir)
    preset = find_preset(str(write_preset(tmp_path / "small.toml")))

    def run(name: str, warm: WarmNetworks | None = None) -> list[str]:
        options = RunOptions(codec="ffv1", device="cpu", conv="onednn", policy="eager")
        request = Request(
            prompts=(Prompt("a cat"),),
            preset=preset,
            out=tmp_path / name,
            options=options,
            host_memory=8 * GIB,
        )
        reporter = Words()
        (outcome,) = generate(request, bundle, reporter, warm=warm)
        assert outcome.error is None, outcome.error
        return reporter.said

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The loads of networks so far."""
    counted: list[str] = []
    for name in ("load_text_network", "load_transformer", "load_decoder"):
        monkeypatch.setattr(
            networks_module, name, counting(counted, name, getattr(networks_module, name))
        )
    return counted


def counting(calls: list[str], name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return work(*arguments, **options)

    return run


def frames(folder: Path) -> bytes:
    return (folder / "0.mkv").read_bytes()


def test_later_runs_load_nothing_and_make_the_same_clip(
    make: Make, loads: list[str], tmp_path: Path
) -> None:
    make("alone", None)
    once = len(loads)
    warm = WarmNetworks()
    said = make("first", warm)
    assert any(line.startswith("kept loaded for the next clips: ") for line in said)
    make("second", warm)
    assert once == 4
    assert len(loads) == 2 * once
    assert frames(tmp_path / "alone") == frames(tmp_path / "first") == frames(tmp_path / "second")


def test_a_run_that_runs_out_of_memory_releases_them_before_it_takes_a_smaller_plan(
    make: Make, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = WarmNetworks()
    make("first", warm)
    denoise, calls = pipeline.denoise_draft, []

    def fails_once(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return denoise(*arguments, **options)

    monkeypatch.setattr(pipeline, "denoise_draft", fails_once)
    said = make("second", warm)
    assert any("are released, and it is tried again" in line for line in said)
    assert not any("retrying with" in line for line in said)
    assert len(loads) == 4 + 2  # high-res and decoder; draft and text encoder were in use or over
    assert frames(tmp_path / "first") == frames(tmp_path / "second")


def test_a_kept_network_has_nothing_of_the_last_clip(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replay(StepReplay):
        """Notes whose step it would replay."""

        def _record(self, *arguments: Any) -> bool:
            seen.append(self._clip is not None)
            return False

    load, seen, replays = networks_module.load_transformer, [], []

    def with_replay(*arguments: Any) -> Any:
        net = load(*arguments)
        net._replay = Replay(print)
        replays.append(net._replay)
        return net

    monkeypatch.setattr(networks_module, "load_transformer", with_replay)
    warm = WarmNetworks()
    make("first", warm)
    assert any(seen)
    assert not warm.is_empty
    assert [replay._clip for replay in replays] == [None, None]


def test_a_run_of_its_own_keeps_nothing(make: Make) -> None:
    said = make("alone", None)
    assert not any("kept loaded" in line for line in said)


def plan_within(gpu: float) -> RunPlan:
    budget = Budget(host=64 * GIB, device=int(gpu * GIB))
    return make_plan(candidates(work_for("2k"), gpu=True), budget)


@pytest.mark.parametrize("gpu", [16, 24, 32, 48, 80])
def test_kept_networks_leave_room_for_the_peak_of_every_stage(gpu: int) -> None:
    plan = plan_within(gpu)
    kept = stages_to_keep(plan)
    limits = {"host": plan.budget.host, "device": plan.budget.device}
    for memory in plan.stages:
        for place in PLACES:
            beside = bytes_beside(plan, kept, memory.stage, place)
            assert memory.peak(place) + beside <= (limits[place] or 0)


def test_all_are_kept_where_all_fit_and_only_lighter_ones_where_they_do_not() -> None:
    everything = frozenset({"text", "draft", "highres", "decode"})
    assert stages_to_keep(plan_within(80)) == everything
    assert stages_to_keep(plan_within(24)) < everything


def test_no_network_is_kept_in_a_budget_of_the_largest_stage_alone() -> None:
    plan = plan_within(80)
    most = {place: max(memory.peak(place) for memory in plan.stages) for place in PLACES}
    budget = Budget(host=most["host"], device=most["device"])
    largest = max(plan.stages, key=lambda memory: memory.peak("device"))
    assert stages_to_keep(replace(plan, budget=budget)) <= {largest.stage}
    assert kept_bytes(largest, "device") > 0


def test_a_network_made_of_something_else_is_closed_and_not_handed_over() -> None:
    warm, closed = WarmNetworks(), []
    warm.keep("draft", "8-bit", "net", closed.append)
    assert warm.take("draft", "exact") is None
    assert closed == ["net"]
    assert warm.is_empty
    warm.keep("draft", "exact", "other", closed.append)
    assert warm.take("draft", "exact") == "other"
    warm.keep("draft", "exact", "other", closed.append)
    warm.release()
    assert closed == ["net", "other"]


def test_of_two_runs_that_make_a_clip_each_keeps_what_both_have_room_for() -> None:
    warm, closed = WarmNetworks(), []
    warm.only = frozenset({"highres"})
    warm.keep("draft", "exact", "draft's", closed.append)
    warm.keep("highres", "exact", "high-res's", closed.append)
    assert closed == ["draft's"]
    warm.keep_only(frozenset({"draft"}))
    assert closed == ["draft's", "high-res's"]


def test_a_draft_and_the_clip_made_of_it_share_what_is_loaded() -> None:
    draft = RunOptions(device="cpu", draft_only=True, save_latents=True)
    assert loading_options(draft) == loading_options(RunOptions(device="cpu"))
    assert loading_options(draft) != loading_options(replace(draft, linear="int8"))


def test_what_the_process_took_is_that_of_its_first_run_in_a_budget_of_that_time() -> None:
    warm = WarmNetworks()
    assert warm.process_bytes(5, of_first=True) == 5
    assert warm.process_bytes(500, of_first=True) == 5


def test_what_a_program_took_since_counts_in_a_budget_of_what_is_free_now() -> None:
    """Seen: a program's 30 GiB of pictures counted as free, as only the budget knew of them."""
    warm = WarmNetworks()
    assert warm.process_bytes(100, of_first=False) == 100
    warm.keep("draft", "exact", "net", print, {"host": 200})
    assert warm.process_bytes(330, of_first=False) == 330 - 200
    assert warm.process_bytes(250, of_first=False) == 100  # what it gave back is not counted on


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes of a GPU, which a test changes."""
    bytes_free = [48 * GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_free[0], 141 * GIB))
    return bytes_free


def plan_on_gpu(
    scratch: int = 0,
    warm: WarmNetworks | None = None,
    frames: int = 121,
    *,
    draft_only: bool = False,
    **limits: int,
) -> OomFallback:
    """Plan a clip on a GPU, with a decoder on engines that have taken so much scratch memory."""
    preset = PRESETS["2k"]
    engine = SimpleNamespace(scratch=scratch, padded=False)
    engines: dict[Network, Any] = {"vae": EngineSet({}, {"fine": engine}, "eager", "")}
    request = Request(
        prompts=(Prompt("a cat"),),
        preset=replace(preset, video=replace(preset.video, frames=frames)),
        out=Path("out"),
        options=RunOptions(device="cuda", precision="bf16", draft_only=draft_only),
        host_memory=64 * GIB,
        **limits,
    )
    bundle: Any = SimpleNamespace(networks=NETWORKS, loras={})
    return plan_run(request, bundle, print, engines, warm=warm)


def stages_run(fallback: OomFallback, warm: WarmNetworks) -> list[int]:
    """Run every stage of a plan; return the bytes of the device that each has at its peak."""
    peaks: list[int] = []
    step = Step(label="", reporter=Words(), stopwatch=Stopwatch(CPU), add_notice=print)

    def compute(net: str, peak: int) -> None:
        peaks.append(peak + warm.device_bytes)

    for memory in fallback.plan.stages:
        with LazyNetwork(
            memory.stage,
            lambda plan: "net",
            fallback,
            Stopwatch(CPU),
            label=memory.stage,
            warm=warm,
        ) as network:
            network.run(step, compute, memory.peak("device"))
    return peaks


def test_a_later_run_may_take_what_kept_networks_hold(free: list[int]) -> None:
    warm = WarmNetworks()
    first = plan_on_gpu(warm=warm)
    stages_run(first, warm)
    free[0] -= warm.device_bytes
    assert free[0] < 40 * GIB
    assert plan_on_gpu(warm=warm).plan == first.plan


def test_networks_that_a_later_plan_does_not_count_leave_it_their_memory(free: list[int]) -> None:
    """Seen: the high-res network stayed beside a longer draft: 33.7 GiB of 30."""
    free[0] = 30 * GIB
    warm = WarmNetworks()
    stages_run(plan_on_gpu(warm=warm), warm)
    free[0] -= warm.device_bytes
    second = plan_on_gpu(warm=warm, frames=161, draft_only=True)
    assert max(stages_run(second, warm)) <= 30 * GIB


def test_a_network_that_a_later_plan_has_smaller_is_not_kept_for_it() -> None:
    """Such as one whose weights are resident, where the next clip has them streamed."""
    warm, closed, plan = WarmNetworks(), [], plan_within(80)
    sizes = {memory.stage: kept_bytes(memory, "device") for memory in plan.stages}
    for stage, more in (("draft", 0), ("highres", 1)):
        warm.keep(stage, "exact", stage, closed.append, {"device": sizes[stage] + more})
    warm.make_room(plan, frozenset({"draft", "highres"}))
    assert closed == ["highres"]


def test_the_first_of_two_runs_that_make_a_clip_keeps_what_the_second_has_room_for() -> None:
    warm, closed, plan = WarmNetworks(), [], plan_within(80)
    draft = replace(plan, stages=tuple(m for m in plan.stages if m.stage != "highres"))
    warm.only = frozenset({"highres"})
    warm.keep("highres", "exact", "net", closed.append, {"device": GIB})
    warm.make_room(draft, frozenset({"draft"}))
    assert not closed
    warm.only = None
    warm.keep("highres", "exact", "large", closed.append, {"device": 80 * GIB})
    warm.make_room(draft, frozenset({"draft"}))
    assert closed == ["large"]


def test_a_draft_alone_leaves_the_high_res_network_where_memory_does(free: list[int]) -> None:
    """Seen: it was loaded again after every look at a draft, with 100 GiB free."""
    free[0] = 141 * GIB
    warm = WarmNetworks()
    stages_run(plan_on_gpu(warm=warm), warm)
    all_of_them = warm.device_bytes
    free[0] -= all_of_them
    plan_on_gpu(warm=warm, draft_only=True)
    assert warm.device_bytes == all_of_them > 20 * GIB


def test_a_network_of_the_plan_that_it_does_not_keep_makes_room_whatever_another_run_keeps() -> (
    None
):
    warm, closed, plan = WarmNetworks(), [], plan_within(80)
    warm.only = frozenset({"draft"})
    size = next(kept_bytes(memory, "device") for memory in plan.stages if memory.stage == "draft")
    warm.keep("draft", "exact", "net", closed.append, {"device": size})
    warm.make_room(plan, frozenset())
    assert closed == ["net"]


def test_scratch_memory_of_opened_engines_is_counted_once(free: list[int]) -> None:
    named = plan_on_gpu(scratch=4 * GIB, gpu_memory=free[0])
    free[0] -= 4 * GIB
    assert plan_on_gpu(scratch=4 * GIB).plan == named.plan
