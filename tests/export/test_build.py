# SPDX-License-Identifier: Apache-2.0
"""Engines are built, checked and stored, with a quick compiler and once with the real one."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pw_engines import EngineError, EngineSpec, EngineStore, FrontEnd
from pw_engines.eager import EagerEngine
from pw_engines.engine import random_inputs
from pw_export import build as builder
from pw_export.build import Built, build, unusable
from pw_export.build_jobs import (
    DecoderSource,
    Job,
    TransformerSource,
    jobs_for,
    pick_compiler,
    platform_for,
)
from pw_runtime.cli.build import _outcome
from pw_runtime.errors import BadRequest
from pw_runtime.execution.compilers import COMPILERS, Compiler, CompilerName
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.presets import NANO_CLIP, NANO_DRAFT
from pw_runtime.types import Preset
from tests.engines.faulty import FaultyEngine
from tests.engines.test_segments import DRAFT, HIGHRES
from tests.tolerance import assert_as_accurate

CPU = torch.device("cpu")
SMALL = Preset(draft=replace(NANO_DRAFT, width=48, height=32), video=NANO_CLIP)
MODULES: dict[str, nn.Module] = {}


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Use a compiler that writes the segment's name, and loads the segment itself."""

    def make(spec: EngineSpec, segment: nn.Module, path: Path, device: torch.device) -> None:
        MODULES[spec.segment] = segment
        path.write_text(spec.segment)

    def load(spec: EngineSpec, path: Path, device: torch.device) -> EagerEngine:
        return EagerEngine(spec, MODULES[path.read_text()])

    compiler = replace(COMPILERS["aoti"], load=load)
    monkeypatch.setattr(builder.aoti, "build", make)
    monkeypatch.setattr(builder, "COMPILERS", {"aoti": compiler})
    return monkeypatch


def jobs(store: EngineStore, chunk: int = 64) -> tuple[list[Job], list[Job]]:
    sources = [TransformerSource(config, "fp32", chunk) for config in (DRAFT, HIGHRES)]
    return jobs_for(sources, "aoti", CPU, store, platform_for("aoti", CPU))


def test_every_engine_is_built_once_for_both_networks(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    missing, fresh = jobs(store)
    assert fresh == []
    names = sorted(job.segment for job in missing)
    assert names == [
        "block_in", "block_out", "control", "embed", "head",
        "modulation", "modulation", "text_embed", "text_keys_values",
    ]  # fmt: skip
    for job in missing:
        built = build(job)
        assert built.error is None
        assert all(parity.good for parity in built.parity)
    missing, fresh = jobs(store)
    assert missing == []
    assert len(fresh) == 9


def test_another_limit_needs_only_what_has_tokens(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    for job in jobs(store)[0]:
        build(job)
    missing, _ = jobs(store, chunk=128)
    assert sorted(job.segment for job in missing) == [
        "block_in", "block_out", "control", "embed", "head",
    ]  # fmt: skip


def test_an_engine_that_computes_something_else_is_not_published(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    def load(spec: EngineSpec, path: Path, device: torch.device) -> FaultyEngine:
        return FaultyEngine(spec, MODULES[spec.segment], fault="nan")

    quick.setattr(builder, "COMPILERS", {"aoti": replace(COMPILERS["aoti"], load=load)})
    job = jobs(store)[0][0]
    built = build(job)
    assert built.error is not None
    assert "does not compute what its segment does" in built.error
    assert store.find(job.key).state == "missing"
    assert store.entries(verify=True) == []


def test_a_compiler_that_fails_is_reported(store: EngineStore, quick: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise EngineError("AOTInductor cannot compile embed: no space")

    quick.setattr(builder.aoti, "build", fail)
    built = build(jobs(store)[0][0])
    assert built.error == "AOTInductor cannot compile embed: no space"
    assert store.remove_leftovers() == []


@pytest.mark.parametrize("change", [{"sources": "0"}, {"weights": "0"}])
def test_an_engine_is_not_published_under_the_key_of_other_sources_or_weights(
    store: EngineStore, quick: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    job = jobs(store)[0][0]
    key = replace(job.key, spec=replace(job.key.spec, **change))
    built = build(replace(job, key=key))
    assert "has changed since this build began" in str(built.error)
    assert "run `pw build` again" in str(built.error)
    assert store.entries(verify=False) == []


@pytest.mark.parametrize("compiler", ["aoti", "tensorrt"])
def test_the_decoder_has_the_same_specs_with_its_weights_and_without(
    compiler: CompilerName, bundle_dir: Path
) -> None:
    """They are looked up without the weights, and built with them."""
    source = DecoderSource(bundle_dir, SMALL)
    looked_up = source.segments(COMPILERS[compiler], None)
    built = source.segments(COMPILERS[compiler], CPU)
    assert {name: one.spec for name, one in built.items()} == {
        name: one.spec for name, one in looked_up.items()
    }


def test_a_failure_is_told_by_the_networks_that_lack_engines(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    """Seen: "the model will run without engines", beside all those of another compiler."""
    aoti = jobs(store)[0]
    openvino = [replace(job, compiler="openvino") for job in aoti]
    decoder = [replace(aoti[0], segment="vae_frame_2x3")]
    everything = [*aoti, *openvino, *decoder]
    assert _outcome(openvino[:1], everything) == "the model has all engines of aoti"
    assert _outcome(decoder, everything) == "the decoder will run without engines"
    assert _outcome([aoti[0], openvino[1], *decoder], everything) == (
        "the model will run without engines, the decoder will run without engines"
    )


def test_what_was_just_built_is_not_built_again(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    job = jobs(store)[0][0]
    assert build(job).seconds > 0
    assert build(job).seconds == 0


@pytest.mark.parametrize(
    ("backend", "message"),
    [("tensorrt", "TensorRT runs on NVIDIA GPUs"), ("auto", "(?s)TensorRT.*no C.. compiler")],
)
def test_a_backend_that_cannot_build_here_says_why(
    backend: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pw_engines.aoti.shutil.which", lambda name: None)
    monkeypatch.setattr(builder.openvino, "unavailable", lambda device: "not installed")
    with pytest.raises(BadRequest, match=message):
        pick_compiler(backend, None, CPU)


def test_a_front_end_asks_for_tensorrt() -> None:
    with pytest.raises(BadRequest, match=r"(?s)for the CPU by tensorrt\n.*runs on NVIDIA GPUs"):
        pick_compiler("auto", "torch-tensorrt", CPU)
    with pytest.raises(BadRequest, match=r"--frontend onnx with --backend aoti"):
        pick_compiler("aoti", "onnx", CPU)
    with pytest.raises(BadRequest, match="--frontend onnx with --backend tensorrt-rtx"):
        pick_compiler("tensorrt-rtx", "onnx", CPU)


@pytest.mark.parametrize(
    ("frontend", "compiler"),
    [(None, "tensorrt"), ("onnx", "tensorrt"), ("torch-tensorrt", "torch-tensorrt")],
)
def test_front_ends_of_tensorrt(
    frontend: FrontEnd | None, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder.tensorrt, "unavailable", lambda device: None)
    monkeypatch.setattr(builder.torch_tensorrt, "unavailable", lambda device: None)
    assert pick_compiler("tensorrt", frontend, CPU) == compiler


def test_engines_of_the_decoder_are_of_one_size_and_kept(
    store: EngineStore, quick: pytest.MonkeyPatch, bundle_dir: Path
) -> None:
    source = DecoderSource(bundle_dir, SMALL)
    missing, _ = jobs_for([source], "aoti", CPU, store, platform_for("aoti", CPU))
    assert [job.segment for job in missing] == [
        "vae_coarse_first_2x3", "vae_fine_first_2x3", "vae_frame_2x3", "vae_coarse_next_2x3",
        "vae_fine_next_2x3",
    ]  # fmt: skip
    built = build(missing[0])
    assert built.error is None
    (entry,) = store.entries(verify=True)
    assert unusable(entry) is None
    taller = replace(SMALL, draft=replace(SMALL.draft, height=64))
    others, fresh = jobs_for(
        [DecoderSource(bundle_dir, taller)], "aoti", CPU, store, platform_for("aoti", CPU)
    )
    assert (len(others), fresh) == (5, [])


def test_engines_of_other_sources_are_of_no_use(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    build(jobs(store)[0][0])
    (entry,) = store.entries(verify=False)
    assert unusable(entry) is None
    other = entry.key | {"platform": [["cpu", "another"]]}
    assert "another machine" in str(unusable(replace(entry, key=other)))
    unknown = entry.key | {"options": [["frontend", "another"]]}
    assert unusable(replace(entry, key=unknown)) == "its key is of another version"
    spec = entry.key["spec"] | {"sources": "0"}
    assert unusable(replace(entry, key=entry.key | {"spec": spec})) is not None


def test_engines_of_every_gpu_of_the_machine_are_of_use(
    store: EngineStore, quick: pytest.MonkeyPatch
) -> None:
    """Seen: those of the second GPU were pruned."""
    gpus = [SimpleNamespace(name=f"GPU {x}", major=8, minor=x) for x in (6, 9)]
    quick.setattr(torch.cuda, "is_available", lambda: True)
    quick.setattr(torch.cuda, "device_count", lambda: 2)
    quick.setattr(
        torch.cuda, "get_device_properties", lambda device: gpus[torch.device(device).index or 0]
    )
    build(jobs(store)[0][0])
    (entry,) = store.entries(verify=False)
    for index in range(2):
        (platform,) = COMPILERS["aoti"].platforms(torch.device("cuda", index))
        key = entry.key | {"platform": [list(fact) for fact in platform]}
        assert unusable(replace(entry, key=key)) is None
    other = [list(fact) for fact in platform if fact[0] != "gpu"] + [["gpu", "GPU 7"]]
    assert "another machine" in str(unusable(replace(entry, key=entry.key | {"platform": other})))


@pytest.mark.slow
def test_real_engine_runs_at_a_size_it_was_not_compiled_for(store: EngineStore) -> None:
    """Built by AOTInductor, loaded from the store."""
    job = next(job for job in jobs(store)[0] if job.segment == "head")
    built = build(job)
    assert built.error is None
    assert all(parity.good for parity in built.parity)
    compiler: Compiler = COMPILERS["aoti"]
    path = store.find(job.key).path
    assert path is not None
    engine = compiler.load(job.key.spec, path, CPU)
    inputs = random_inputs(engine.spec, {"tokens": 33}, CPU, seed=1)
    module = segments_of(DRAFT, "fp32", 64)["head"].module
    with torch.inference_mode():
        (expected,) = module(*inputs)
        (exact,) = copy.deepcopy(module).double()(*(x.double() for x in inputs))
        result = torch.empty_like(expected)
        engine.run(inputs, [result])
    assert_as_accurate(result, expected, exact)


def test_without_room_for_temporary_files_nothing_is_built(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**20))
    monkeypatch.setattr(builder, "_in_own_process", lambda *given: pytest.fail("built"))
    with pytest.raises(BadRequest, match=f"(?s){tmp_path}.*5.0 MiB free.*512 MiB") as refused:
        builder.run_jobs(jobs(store)[0], 2, lambda built: None)
    assert "TMPDIR" in str(refused.value)


def test_a_temporary_folder_that_runs_full_ends_the_build_with_one_error(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free, started = [2**40], []

    def fail(job: Job, on_event: object) -> Built:
        started.append(job)
        free[0] = 0
        return Built(job, 1.0, error="g++: No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(builder, "_in_own_process", fail)
    said: list[Built] = []
    with pytest.raises(BadRequest, match=r"0\.0 MiB free"):
        builder.run_jobs(jobs(store)[0], 1, said.append)
    assert said == []
    assert len(started) == 1
