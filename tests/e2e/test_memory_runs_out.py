# SPDX-License-Identifier: Apache-2.0
"""A stage that runs out of memory goes on once, in its next smaller way, and says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pw_engines import EngineError
from pw_runtime import pipeline
from pw_runtime.execution import transformer
from pw_runtime.execution.weight_streaming import StreamedWeights
from pw_runtime.job import networks as networks_module
from pw_runtime.planning import oom_fallback
from pw_runtime.types import TilingConfig
from tests.e2e.pw import Ended, Pw, write_preset


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """High enough for several bands: 20 latent rows."""
    path = write_preset(tmp_path / "high.toml", draft_width=64)
    path.write_text(re.sub(r"height = \d+", "height = 320", path.read_text()))
    path.write_text(path.read_text().replace("width = 192", "width = 64"))
    return path


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--codec", "ffv1", "--prompt", "a cat", "--prompt", "a dog", "--save-latents",
            *arguments,
        )  # fmt: skip

    return run


def fails(times: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, whose first calls run out of memory."""
    calls: list[None] = []

    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return work(*arguments, **options)

    return run


@pytest.mark.parametrize("stage", ["draft", "highres", "decode"])
def test_it_goes_on_with_the_same_result(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    assert generate("--out", tmp_path / "whole").code == 0
    name = {"draft": "denoise_draft", "highres": "denoise_highres", "decode": "decode_frames"}[
        stage
    ]
    monkeypatch.setattr(pipeline, name, fails(1, getattr(pipeline, name)))
    ended = generate()
    assert ended.code == 0
    assert f"{stage}: out of memory (CUDA out of memory. Tried to allocate 1 GiB)" in ended.err
    for clip in "01":
        name = f"{clip}.latents.safetensors"
        wanted, got = load_file(tmp_path / "whole" / name), load_file(tmp_path / "out" / name)
        assert all(torch.equal(wanted[key], got[key]) for key in wanted)
        receipt = json.loads((tmp_path / "out" / f"{clip}.json").read_text())
        assert any("retrying with" in one for one in receipt["plan"]["decisions"])
    told = [
        sum("out of memory" in one for one in json.loads(path.read_text())["notices"])
        for path in sorted((tmp_path / "out").glob("?.json"))
    ]
    assert told == [1, 0]  # the second clip began in the smaller way


def test_a_network_that_does_not_fit_is_loaded_in_the_smaller_way(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "load_dit", fails(1, transformer.load_dit))
    ended = generate()
    assert ended.code == 0
    assert "draft: out of memory" in ended.err
    # Not with as many weights, which would not fit either.
    assert "retrying with weights streamed from the bundle's files" in ended.err


def test_where_no_way_is_left_that_prompt_alone_ends(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = pipeline.denoise_highres

    def first_clip_never_fits(net: Any, text: Any, *arguments: Any) -> Any:
        if not seen or text is seen[0]:
            seen[:] = [text]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(net, text, *arguments)

    seen: list[Any] = []
    monkeypatch.setattr(pipeline, "denoise_highres", first_clip_never_fits)
    ended = generate()
    assert ended.code == 3
    assert "retrying with" in ended.err  # every smaller way was tried before
    assert "prompt 0 failed: out of memory" in ended.err
    assert not (tmp_path / "out" / "0.mkv").exists()
    assert (tmp_path / "out" / "1.mkv").exists()


def test_an_engine_that_runs_out_of_memory_is_told_by_its_cause() -> None:
    failed = EngineError("block_in failed in AOTInductor")
    failed.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert oom_fallback.out_of_memory(failed) is not None
    assert oom_fallback.out_of_memory(RuntimeError("CUDNN_STATUS_ALLOC_FAILED")) is not None
    assert oom_fallback.out_of_memory(EngineError("a plan of another GPU")) is None
    assert oom_fallback.out_of_memory(ValueError("out of memory")) is None


def test_a_draft_is_decoded_as_it_was_planned(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen: the plan was made for the preset's strips, and the draft decoded in one piece."""
    tilings: list[TilingConfig] = []
    work = pipeline.decode_frames

    def noted(vae: Any, latent: Any, tiling: TilingConfig, *arguments: Any, **options: Any) -> Any:
        tilings.append(tiling)
        if len(tilings) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(vae, latent, tiling, *arguments, **options)

    monkeypatch.setattr(pipeline, "decode_frames", noted)
    assert generate("--draft-only").code == 0
    # The second clip begins in the smaller way; more bands than one would each be as large.
    assert [(tiling.strips, tiling.order) for tiling in tilings] == [
        (2, "frames"),
        (2, "tiles"),
        (2, "tiles"),
    ]


def test_streamed_weights_make_the_same_clip(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert generate("--out", tmp_path / "whole").code == 0
    made: list[StreamedWeights] = []

    class Noted(StreamedWeights):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    def third(ways: Any, budget: Any) -> Any:  # the first way with weights that come from the files
        return next(way for way in ways if getattr(way.choice, "weights", "mapped") == "mapped")

    monkeypatch.setattr(transformer, "StreamedWeights", Noted)
    monkeypatch.setattr("pw_runtime.planning.planner._first", third)
    ended = generate()
    assert ended.code == 0
    assert len(made) == 2
    wanted, got = (
        load_file(tmp_path / name / "0.latents.safetensors") for name in ("whole", "out")
    )
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)


def test_a_budget_is_heeded_or_refused_before_anything_is_loaded(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        networks_module, "load_text_network", lambda *arguments: pytest.fail("loaded")
    )
    ended = generate("--host-memory", "64MiB")
    assert ended.code == 2
    assert "does not fit into memory" in ended.err
    assert "do this: free memory" in ended.err


def test_other_errors_are_not_tried_again(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def broken(*arguments: Any) -> None:
        calls.append(None)
        raise RuntimeError("something else")

    monkeypatch.setattr(pipeline, "denoise_highres", broken)
    assert generate().code == 3
    assert len(calls) == 2  # once a prompt


def test_measured_and_predicted_peaks_stand_in_the_receipt(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    assert generate().code == 0
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    stages = receipt["plan"]["stages"]
    assert list(stages) == ["text", "draft", "highres", "decode"]
    assert all(one["measured"]["host"] > 0 < one["predicted"]["host"] for one in stages.values())
    measured = max(one["measured"]["host"] for one in stages.values())
    assert receipt["peak_memory_bytes"]["host"] >= measured
