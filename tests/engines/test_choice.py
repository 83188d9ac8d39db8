# SPDX-License-Identifier: Apache-2.0
"""Engines are selected by policy and by what the store has."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from pw_engines import EngineError, EngineSpec, EngineStore, Speed
from pw_engines.eager import EagerEngine
from pw_engines.store import Lookup
from pw_engines.tensorrt import rtx
from pw_runtime.errors import BadRequest
from pw_runtime.execution import engine_lookup
from pw_runtime.execution.block_division import require_attention_engines
from pw_runtime.execution.engine_lookup import (
    Compiler,
    EngineSet,
    build_command,
    choose_engines,
    keys_of,
)
from pw_runtime.execution.engine_records import step_ratio, tokens_per_call
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.types import DitConfig, LinearFormat, Precision, RunOptions
from tests.engines.test_segments import DRAFT, HIGHRES

CPU = torch.device("cpu")
PLATFORMS = [(("cpu", "any"),)]


@pytest.fixture
def segments() -> dict[str, Segment]:
    return segments_of(DRAFT, "fp32", 64)


@pytest.fixture
def store(
    tmp_path: Path, segments: dict[str, Segment], monkeypatch: pytest.MonkeyPatch
) -> EngineStore:
    """A store, and a compiler whose engines are files that say "good"."""
    whole = segments_of(DRAFT, "fp32", 64, blocks="whole", tokens=24)

    def load(spec: EngineSpec, path: Path, device: torch.device) -> EagerEngine:
        if path.read_text() != "good":
            raise EngineError(f"{path} is no engine")
        return EagerEngine(spec, (segments | whole)[spec.segment].module)

    def missing(device: torch.device) -> str:
        return "not on this machine"

    compilers = {
        name: Compiler(
            backend=compiler.backend,
            file=compiler.file,
            unavailable=missing if "tensorrt" in compiler.backend else lambda device: None,
            platforms=lambda device: PLATFORMS,
            load=load,
            frontend=compiler.frontend,
        )
        for name, compiler in engine_lookup.COMPILERS.items()
    }
    monkeypatch.setattr(engine_lookup, "COMPILERS", MappingProxyType(compilers))
    return EngineStore(tmp_path / "engines")


def put(
    store: EngineStore,
    segment: Segment,
    text: str = "good",
    compiler: engine_lookup.CompilerName = "aoti",
) -> None:
    (key,) = keys_of(segment, compiler, PLATFORMS)
    with store.locked(key), store.publishing(key, "engine.pt2") as path:
        path.write_text(text)


def test_auto_takes_engines_that_are_all_there(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        put(store, segment)
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "aoti"
    assert choice.engines.keys() == segments.keys()
    assert str(store.root) in choice.reason


def test_auto_runs_the_segments_where_one_engine_lacks_and_says_which(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        if segment.name != "head":
            put(store, segment)
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "eager"
    assert choice.reason == "no head (not built yet)"


def test_engines_or_nothing(store: EngineStore, segments: dict[str, Segment]) -> None:
    with pytest.raises(BadRequest, match=r"(?s)has no engines for.*no engine is built.*pw build"):
        choose_engines(segments, "engines", store, CPU, "pw build")


def test_eager_does_not_look(store: EngineStore, segments: dict[str, Segment]) -> None:
    for segment in segments.values():
        put(store, segment)
    choice = choose_engines(segments, "eager", store, CPU, "pw build")
    assert (choice.backend, choice.reason) == ("eager", "asked for")


@pytest.mark.parametrize("policy", ["auto", "engines"])
def test_an_engine_that_cannot_be_opened_is_an_error(
    store: EngineStore, segments: dict[str, Segment], policy: engine_lookup.EnginePolicy
) -> None:
    for segment in segments.values():
        put(store, segment, "bad" if segment.name == "embed" else "good")
    with pytest.raises(BadRequest, match=r"(?s)cannot be opened.*is no engine.*pw engines prune"):
        choose_engines(segments, policy, store, CPU, "pw build")


def test_a_changed_file_counts_as_missing(store: EngineStore, segments: dict[str, Segment]) -> None:
    for segment in segments.values():
        put(store, segment)
    lookup = store.find(keys_of(segments["embed"], "aoti", PLATFORMS)[0])
    assert lookup.path is not None
    lookup.path.write_text("evil")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "eager"
    assert "no embed" in choice.reason
    assert "SHA-256 differs" in choice.reason


def test_engines_that_are_all_damaged_are_not_said_to_be_missing(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        put(store, segment)
        path = store.find(keys_of(segment, "aoti", PLATFORMS)[0]).path
        assert path is not None
        path.write_text("evil")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "eager"
    assert choice.reason.count("SHA-256 differs") == len(segments)


@pytest.mark.parametrize("compiler", ["aoti", "openvino"])
def test_an_engine_that_is_removed_before_it_is_opened_is_one_error(
    store: EngineStore, segments: dict[str, Segment], compiler: engine_lookup.CompilerName
) -> None:
    for segment in segments.values():
        put(store, segment, compiler=compiler)

    def remove(found: object, files: dict[str, Lookup]) -> None:
        """Stand in for another process: ratios are asked for after the engines were found."""
        assert files["head"].path is not None
        store.remove(files["head"].path.parent.name)

    with pytest.raises(BadRequest, match=r"(?s)is gone or cannot be read.*head-.*do this: run"):
        choose_engines(segments, "auto", store, CPU, "pw build", ratio_of=remove)


@pytest.fixture
def with_tensorrt(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT is there too."""
    able = {
        name: replace(compiler, unavailable=lambda device: None)
        for name, compiler in engine_lookup.COMPILERS.items()
    }
    monkeypatch.setattr(engine_lookup, "COMPILERS", MappingProxyType(able))


@pytest.mark.usefixtures("with_tensorrt")
def test_front_ends_are_searched_in_order_and_the_reason_names_which(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        put(store, segment, compiler="torch-tensorrt")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "tensorrt"
    assert choice.reason == f"built engines in {store.root}, front end torch-tensorrt"
    for segment in segments.values():
        put(store, segment, compiler="tensorrt")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.reason == f"built engines in {store.root}, front end onnx"


@pytest.mark.usefixtures("with_tensorrt")
@pytest.mark.parametrize(
    ("capability", "first"),
    [
        *((number, "tensorrt-rtx") for number in ((8, 6), (8, 9), (12, 0), (12, 1))),
        *((number, "tensorrt") for number in ((8, 0), (9, 0), (10, 0), (10, 3))),
    ],
)
def test_the_gpu_decides_which_tensorrt_comes_first(
    store: EngineStore,
    segments: dict[str, Segment],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    first: str,
) -> None:
    major, minor = capability
    properties = SimpleNamespace(name="any", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for segment in segments.values():
        put(store, segment, compiler="tensorrt")
        put(store, segment, compiler="tensorrt-rtx")
    choice = choose_engines(segments, "auto", store, torch.device("cuda"), "pw build")
    assert choice.to_dict()["backend"] == first  # as the receipt has it


@pytest.mark.usefixtures("with_tensorrt")
def test_engines_of_two_front_ends_are_not_mixed(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        put(store, segment, compiler="tensorrt" if segment.name == "head" else "torch-tensorrt")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "eager"
    assert "torch-tensorrt: no head (not built yet)" in choice.reason


def test_a_plan_of_another_front_end_is_another_engine(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    names = ("tensorrt", "torch-tensorrt")
    keys = {name: keys_of(segments["head"], name, PLATFORMS)[0] for name in names}
    assert keys["tensorrt"].options == (("frontend", "onnx"),)
    assert keys["torch-tensorrt"].options == (("frontend", "torch-tensorrt"),)
    assert keys["tensorrt"].folder != keys["torch-tensorrt"].folder


def test_a_file_in_the_place_of_the_store_is_an_error(
    store: EngineStore, segments: dict[str, Segment], tmp_path: Path
) -> None:
    """Seen: without a word, no engines."""
    store.root.write_text("a file")
    with pytest.raises(BadRequest, match=f"(?s)cannot be used.*{store.root} is a file.*PW_CACHE"):
        choose_engines(segments, "auto", store, CPU, "pw build")
    below = EngineStore(store.root / "engines")
    with pytest.raises(BadRequest, match=f"{store.root} is a file"):
        choose_engines(segments, "auto", below, CPU, "pw build")


@pytest.mark.parametrize("fault", ["missing", "full"])
def test_engines_without_a_temporary_folder_are_no_reason_to_remove_them(
    store: EngineStore,
    segments: dict[str, Segment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    for segment in segments.values():
        put(store, segment)
    folder = tmp_path / "temporary"
    if fault == "full":
        folder.mkdir()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    monkeypatch.setenv("TMPDIR", str(folder))
    with pytest.raises(BadRequest) as refused:
        choose_engines(segments, "auto", store, CPU, "pw build")
    assert str(folder) in str(refused.value)
    assert ("1.0 MiB free" if fault == "full" else "no folder") in str(refused.value)
    assert "prune" not in str(refused.value)
    assert choose_engines(segments, "eager", store, CPU, "pw build").backend == "eager"


def put_measured(
    store: EngineStore,
    segments: dict[str, Segment],
    compiler: engine_lookup.CompilerName,
    **ratios: float,
) -> None:
    """Build all engines, some of them so many times as fast as their segment."""
    for name, segment in segments.items():
        put(store, segment, compiler=compiler)
        tokens = 24 if dict(segment.spec.limits).get("tokens") else 0
        speed = Speed(
            tokens=tokens,
            threads=torch.get_num_threads(),
            seconds=1.0,
            eager=ratios.get(name, 1.0),
            error=0.0,
        )
        store.record(keys_of(segment, compiler, PLATFORMS)[0], speed)


def choose(
    store: EngineStore,
    segments: dict[str, Segment],
    policy: engine_lookup.EnginePolicy = "auto",
    layers: int = 30,
) -> EngineSet:
    def ratio_of(found: dict[str, Segment], files: dict[str, Lookup]) -> float | None:
        return step_ratio(found, files, replace(DRAFT, num_layers=layers), "exact", tokens=24)

    return choose_engines(segments, policy, store, CPU, "pw build", ratio_of=ratio_of)


def test_on_a_cpu_the_fastest_engines_run(store: EngineStore, segments: dict[str, Segment]) -> None:
    put_measured(store, segments, "aoti", block_in=1.2, block_out=1.2)
    put_measured(store, segments, "openvino", block_in=1.0, block_out=1.6)
    choice = choose(store, segments)
    assert choice.backend == "openvino"
    assert choice.to_dict()["measured"] == "1.29"  # 81 / 63 calls of a step


def test_blocks_count_as_often_as_they_run(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    put_measured(store, segments, "aoti", embed=0.1, head=0.1, modulation=0.1, text_embed=0.1)
    put_measured(store, segments, "openvino", block_in=0.9, block_out=0.9)
    assert choose(store, segments, layers=30).backend == "eager"
    chosen = choose(store, segments, "engines", layers=30)
    assert (chosen.backend, chosen.to_dict()["measured"]) == ("aoti", "0.96")
    assert choose(store, segments, "engines", layers=1).backend == "openvino"


LAYERS = 30


@pytest.mark.parametrize(
    ("config", "precision", "linear", "ratios", "expected"),
    [
        # embed, head and modulation once; the parts of the exact blocks, then of the 28 others
        (DRAFT, "fp32", "int8", {"block_in": 0.5, "block_in_int8": 4}, (3 + 2 * 1.5 + 28 * 5) / 63),
        # block 0 has its own block_in
        (DRAFT, "bf16", "exact", {"block_in_first": 0.1, "block_in": 2}, (3 + 1.1 + 29 * 3) / 63),
        # of the two exact blocks, the first
        (
            DRAFT,
            "bf16",
            "int8",
            {"block_in_first": 0.1, "block_in": 7, "block_in_int8": 4},
            (3 + 1.1 + 8 + 28 * 5) / 63,
        ),
        # the control once for each block that receives it; there the input is fp32
        (
            replace(HIGHRES, control_blocks=(0, 2)),
            "bf16",
            "exact",
            {"block_in_first": 0.1, "block_in": 2, "control": 3},
            (3 + 2 * 3 + 30 * 3) / 65,
        ),
    ],
)
def test_every_segment_counts_as_often_as_a_step_runs_it(
    config: DitConfig,
    precision: Precision,
    linear: LinearFormat,
    ratios: dict[str, float],
    expected: float,
) -> None:
    config = replace(config, num_layers=LAYERS)
    segments = segments_of(config, precision, 64, linear)
    speed = Speed(tokens=24, threads=torch.get_num_threads(), seconds=1.0, eager=1.0, error=0.0)
    files = {
        name: Lookup(state="fresh", speeds=(replace(speed, eager=ratios.get(name, 1.0)),))
        for name in segments
    }
    assert step_ratio(segments, files, config, linear, 24) == pytest.approx(expected)


def test_engines_slower_than_uncompiled_are_left_out_and_the_reason_says_so(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    put_measured(store, segments, "aoti", block_in=0.5, block_out=0.5)
    choice = choose(store, segments)
    assert choice.backend == "eager"
    assert choice.reason == "aoti engines are slower here: 0.52x by `pw build`"
    assert choose(store, segments, "engines").backend == "aoti"  # asked for


def test_engines_that_nobody_measured_run_as_before(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        put(store, segment)
    choice = choose(store, segments)
    assert (choice.backend, choice.ratio) == ("aoti", None)
    assert "measured" not in choice.to_dict()
    put_measured(store, segments, "openvino", block_in=0.9, block_out=0.9)
    assert choose(store, segments).backend == "aoti"
    put_measured(store, segments, "openvino", block_in=1.1, block_out=1.1)
    assert choose(store, segments).backend == "openvino"


def test_measurements_on_another_number_of_threads_decide_nothing(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    """Seen: figures of `pw build` on one thread decided for runs on all cores."""
    threads = torch.get_num_threads()
    slow = Speed(tokens=24, threads=threads + 1, seconds=1.0, eager=0.5, error=0.0)
    for segment in segments.values():
        put(store, segment)
        store.record(keys_of(segment, "aoti", PLATFORMS)[0], slow)
    choice = choose(store, segments)
    assert (choice.backend, choice.ratio) == ("aoti", None)
    for segment in segments.values():
        fast = replace(slow, threads=threads, eager=2.0)
        store.record(keys_of(segment, "aoti", PLATFORMS)[0], fast)
    assert choose(store, segments).ratio == 2.0


def test_the_measurement_nearest_to_the_calls_of_a_clip_counts(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    put_measured(store, segments, "aoti", block_in=0.5, block_out=0.5)
    for name in ("block_in", "block_out"):
        threads = torch.get_num_threads()
        fast = Speed(tokens=60, threads=threads, seconds=1.0, eager=2.0, error=0.0)
        store.record(keys_of(segments[name], "aoti", PLATFORMS)[0], fast)
    files = {
        name: store.find(keys_of(segment, "aoti", PLATFORMS)[0])
        for name, segment in segments.items()
    }
    config = replace(DRAFT, num_layers=100)
    ratios = [
        step_ratio(segments, files, config, "exact", tokens) for tokens in (10, 24, 50, 64, 100_000)
    ]
    assert [ratio is not None and ratio > 1 for ratio in ratios] == [False, False, True, True, True]
    assert (tokens_per_call(100, 64), tokens_per_call(64, 64), tokens_per_call(3, 64)) == (
        50,
        64,
        3,
    )


def test_engines_of_another_version_or_processor_are_named(
    store: EngineStore, segments: dict[str, Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    for segment in segments.values():
        put(store, segment)

    def on(**facts: str) -> str:
        compiler = replace(
            engine_lookup.COMPILERS["aoti"], platforms=lambda device: [tuple(facts.items())]
        )
        monkeypatch.setattr(engine_lookup, "COMPILERS", MappingProxyType({"aoti": compiler}))
        return choose_engines(segments, "auto", store, CPU, "pw build").reason

    assert on(cpu="other") == "built with cpu any where this is other: build them again"
    assert on(cpu="any", processor="0") == "built for another processor: build them again"


def test_engines_of_the_other_front_end_are_not_said_to_be_of_another_version(
    store: EngineStore, segments: dict[str, Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two front ends have one backend, and platforms that always differ."""
    for segment in segments.values():
        put(store, segment, compiler="torch-tensorrt")
    compilers = engine_lookup.COMPILERS
    onnx = replace(
        compilers["tensorrt"],
        unavailable=lambda device: None,
        platforms=lambda device: [(("cpu", "any"), ("recipe", "0"))],
    )
    monkeypatch.setattr(engine_lookup, "COMPILERS", MappingProxyType({"tensorrt": onnx}))
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.reason == "no engine is built"


def test_engines_of_a_backend_that_was_removed_are_named(
    store: EngineStore, segments: dict[str, Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(device: torch.device) -> str:
        return "OpenVINO is not installed: pip install it"

    compiler = replace(engine_lookup.COMPILERS["openvino"], unavailable=missing)
    monkeypatch.setattr(engine_lookup, "COMPILERS", MappingProxyType({"openvino": compiler}))
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.reason == "no engine is built"
    for segment in segments.values():
        put(store, segment, compiler="openvino")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.reason == "OpenVINO is not installed: pip install it"
    with pytest.raises(BadRequest, match="OpenVINO is not installed"):
        choose_engines(segments, "engines", store, CPU, "pw build")


WHOLE = RunOptions(blocks="whole", device="cuda", precision="bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(WHOLE, policy="eager"), "got: --policy eager"),
        (replace(WHOLE, kernels="triton"), "got: --kernels triton"),
        (replace(WHOLE, attention="cudnn"), "got: --attention cudnn"),
        (replace(WHOLE, precision="fp32"), "got: --precision fp32"),
    ],
)
def test_options_that_attention_inside_engines_contradicts_are_refused(
    options: RunOptions, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "cannot_run", lambda device: None)
    with pytest.raises(BadRequest, match=message):
        require_attention_engines(options)
    require_attention_engines(replace(WHOLE, attention="reference"))


def test_attention_inside_engines_is_for_gpus_of_tensorrt_for_rtx() -> None:
    with pytest.raises(BadRequest, match="TensorRT for RTX, which cannot run here"):
        require_attention_engines(replace(WHOLE, device="cpu"))


def test_engines_of_another_division_are_no_fallback(store: EngineStore) -> None:
    """They were asked for to be compared: what runs is them or nothing."""
    for segment in segments_of(DRAFT, "fp32", 64).values():
        put(store, segment)
    whole = segments_of(DRAFT, "fp32", 64, blocks="whole", tokens=24)
    with pytest.raises(BadRequest, match=r"(?s)as --blocks whole asks.*no block \(not built yet\)"):
        choose_engines(whole, "engines", store, CPU, "pw build", "--blocks whole")
    put(store, whole["block"])
    choice = choose_engines(whole, "engines", store, CPU, "pw build", "--blocks whole")
    assert choice.engines.keys() == whole.keys()


def test_the_command_that_builds_engines_names_the_division() -> None:
    options = RunOptions(blocks="attention", device="cpu", precision="bf16")
    command = build_command(options, Path("bundle"))
    assert command.endswith(" --blocks attention")
