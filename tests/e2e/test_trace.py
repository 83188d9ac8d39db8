# SPDX-License-Identifier: Apache-2.0
"""What a run tells of its time: a trace file, and spans that add up to the whole."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path

import pytest
import torch

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.job import networks as networks_module
from pw_runtime.pipeline import generate
from pw_runtime.presets import read_preset
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Trace, observe, span
from pw_runtime.types import Prompt, Request
from tests.e2e.pw import Pw

CPU = torch.device("cpu")
PROMPT = Prompt(id="0", text="a red ball", position=1)


def test_the_trace_file_has_every_step_and_chunk(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    plan, trace = read_preset(preset), tmp_path / "trace.json"
    ran = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a red ball",
        "--out", tmp_path, "--trace", trace,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    events = json.loads(trace.read_text())["traceEvents"]
    timed = [event for event in events if event["ph"] == "X"]
    names = [event["name"] for event in timed]
    assert plan.highres is not None
    assert names.count("step 1") == 2
    steps = sum(name.startswith("step ") for name in names)
    assert steps == plan.draft.steps + plan.highres.steps
    assert names.count("chunk") == (plan.video.frames - 1) // 4
    assert {"load draft", "draft", "condition", "highres", "load vae", "mux"} < set(names)
    threads = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert threads == {"MainThread", "pw-overlap"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in timed)


def test_a_failed_run_leaves_its_trace(pw: Pw, bundle_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    ran = pw(
        "generate", "--model", bundle_dir, "--preset", "2k", "--prompt", "a", "--out", tmp_path,
        "--host-memory", "1M", "--trace", trace,
    )  # fmt: skip
    assert ran.code != 0
    assert any(event["name"] == "plan" for event in json.loads(trace.read_text())["traceEvents"])


def test_top_spans_cover_the_run(bundle_dir: Path, preset: Path, tmp_path: Path) -> None:
    request = Request(
        prompts=(PROMPT,), preset=read_preset(preset), out=tmp_path, overwrite=True, fresh=True
    )
    bundle = open_bundle(bundle_dir)
    generate(request, bundle, Reporter(quiet=True))  # what is imported late is there then
    shares = []
    for _ in range(4):  # another process may take the time between two spans of some
        trace, start = Trace(CPU), time.perf_counter()
        with trace.recording():
            generate(request, bundle, Reporter(quiet=True))
        wall = time.perf_counter() - start
        top = [one for one in trace.spans if one.depth == 0 and one.thread == "MainThread"]
        shares.append(sum(one.end - one.start for one in top) / wall)
    assert all(share <= 1 for share in shares)
    assert max(shares) >= 0.9, shares  # of half a second; 0.99 of runs that last longer


def test_latents_are_shown_step_by_step(bundle_dir: Path, preset: Path, tmp_path: Path) -> None:
    plan = read_preset(preset)
    seen: list[torch.Size] = []
    trace = Trace(CPU, on_tensor=lambda name, x: seen.append(x.shape))
    with trace.recording():
        generate(
            Request(prompts=(PROMPT,), preset=plan, out=tmp_path),
            open_bundle(bundle_dir),
            Reporter(quiet=True),
        )
    assert plan.highres is not None
    assert len(seen) == plan.draft.steps + plan.highres.steps
    assert len(set(seen)) == 2


def test_nothing_is_recorded_where_nobody_asked() -> None:
    trace = Trace(CPU)
    with span("before"):
        observe("x", torch.zeros(1))
    with trace.recording(), span("outer"), pytest.raises(KeyError), span("inner"):
        raise KeyError
    with span("after"):
        pass
    assert [(one.name, one.depth) for one in trace.spans] == [("inner", 1), ("outer", 0)]


def test_networks_are_let_go_without_the_collector(
    bundle_dir: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cycle holds them: between stages the collector, which takes long, is not called."""
    nets: list[weakref.ref[object]] = []
    alive: list[int] = []
    load = networks_module.load_transformer

    def loading(*arguments: object) -> object:
        alive.append(sum(one() is not None for one in nets))
        net = load(*arguments)  # type: ignore[arg-type]
        nets.append(weakref.ref(net))
        return net

    monkeypatch.setattr(networks_module, "load_transformer", loading)
    gc.disable()
    try:
        generate(
            Request(prompts=(PROMPT,), preset=read_preset(preset), out=tmp_path),
            open_bundle(bundle_dir),
            Reporter(quiet=True),
        )
        assert alive == [0, 0]
        assert [one() for one in nets] == [None, None]
    finally:
        gc.enable()
