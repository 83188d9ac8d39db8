# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's engines: built from our ONNX models, run in the caller's memory, refused in words."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pw_engines import SMALLEST, EngineError, check_parity, openvino, require_parity
from pw_engines.engine import random_inputs
from pw_export.onnx_export import export_segment
from pw_runtime.execution.transformer_segments import Segment, segments_of
from tests.closeness import max_abs
from tests.engines.test_segments import HIGHRES

CPU = torch.device("cpu")
LIMIT = 64
needs_openvino = pytest.mark.skipif(
    openvino.unavailable(CPU) is not None, reason=str(openvino.unavailable(CPU))
)


@pytest.fixture(scope="module")
def segments() -> dict[str, Segment]:
    return segments_of(HIGHRES, "fp32", LIMIT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, segments: dict[str, Segment]) -> Path:
    """The folder of an engine of every segment."""
    folder = tmp_path_factory.mktemp("openvino")
    for name, segment in segments.items():
        varying = bool(segment.spec.limits)
        openvino.build(segment.spec, export_segment(segment, varying=varying), folder / name)
    return folder


@needs_openvino
def test_every_segment_is_computed_at_any_size(segments: dict[str, Segment], built: Path) -> None:
    for name, segment in segments.items():
        engine = openvino.load(segment.spec, built / name, CPU)
        require_parity(name, check_parity(engine, segment.module, CPU))
    spec = segments["block_out"].spec
    engine = openvino.load(spec, built / "block_out", CPU)
    for tokens in (SMALLEST, LIMIT, 17, 17):  # sizes may follow each other in any order
        sizes = dict(spec.limits) | {"tokens": tokens}
        inputs = random_inputs(spec, sizes, CPU, seed=tokens)
        before = [x.clone() for x in inputs]
        out = torch.full(spec.outputs[0].sized(sizes), float("nan"))
        engine.run(inputs, [out])
        (expected,) = segments["block_out"].module(*inputs)
        assert (out - expected).norm() / expected.norm() < 1e-5
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@needs_openvino
def test_results_outlive_the_inputs_and_the_next_call(
    segments: dict[str, Segment], built: Path
) -> None:
    """Input and output share the caller's memory, which it may free or reuse between calls."""
    spec = segments["embed"].spec
    engine = openvino.load(spec, built / "embed", CPU)
    kept = []
    for seed in range(20):
        inputs = random_inputs(spec, {"tokens": 33}, CPU, seed)
        (expected,) = segments["embed"].module(*inputs)
        out = torch.empty(spec.outputs[0].sized({"tokens": 33}))
        engine.run(inputs, [out])
        kept.append((out, expected))
    assert all(max_abs(out, expected) < 1e-4 for out, expected in kept)


@needs_openvino
def test_an_engine_is_given_only_what_it_can_take(
    segments: dict[str, Segment], built: Path
) -> None:
    spec = segments["embed"].spec
    engine = openvino.load(spec, built / "embed", CPU)
    x, weight, bias = random_inputs(spec, {"tokens": 5}, CPU, seed=0)
    out = torch.full(spec.outputs[0].sized({"tokens": 5}), float("nan"))
    wide = torch.zeros(5, 2 * x.shape[1])[:, ::2]
    for refused, message in (
        ([x.double(), weight, bias], "patches: expected fp32, got torch.float64"),
        ([torch.zeros(LIMIT + 1, x.shape[1]), weight, bias], "tokens from 2 to 64, got 65"),
        ([wide, weight, bias], "embed, tensor patches: expected contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.run(refused, [out])
    assert torch.isnan(out).all()


@needs_openvino
@pytest.mark.parametrize("kept", [0, 1000, -1000])
def test_a_damaged_engine_is_one_error(
    kept: int, segments: dict[str, Segment], built: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / openvino.FILE
    damaged.write_bytes((built / "block_in").read_bytes()[:kept])
    with pytest.raises(EngineError, match="OpenVINO cannot open"):
        openvino.load(segments["block_in"].spec, damaged, CPU)


@needs_openvino
def test_an_engine_of_another_segment_is_an_error(
    segments: dict[str, Segment], built: Path
) -> None:
    with pytest.raises(EngineError, match=r"takes x, .*, expected patches"):
        openvino.load(segments["embed"].spec, built / "head", CPU)


@needs_openvino
def test_what_openvino_cannot_read_is_one_error(
    segments: dict[str, Segment], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="OpenVINO cannot compile embed: "):
        openvino.build(segments["embed"].spec, b"no model", tmp_path / openvino.FILE)
    assert not (tmp_path / openvino.FILE).exists()


def test_bf16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    spec = segments_of(HIGHRES, "bf16", LIMIT)["block_out"].spec
    with pytest.raises(EngineError, match=r"fp32, and block_out has tensors of bf16: use --prec"):
        openvino.build(spec, b"", tmp_path / openvino.FILE)


@needs_openvino
def test_threads_are_those_of_pytorch(segments: dict[str, Segment], built: Path) -> None:
    spec = segments["embed"].spec
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            engine = openvino.load(spec, built / "embed", CPU)
            compiled = engine._request.get_compiled_model()
            assert compiled.get_property("INFERENCE_NUM_THREADS") == count
            assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    finally:
        torch.set_num_threads(threads)


class SignalStack(ctypes.Structure):
    """The stack_t of sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int | None, int, int]:
    """Return address, flags and bytes of the stack that this thread handles signals on."""
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.sp, stack.flags, stack.size


@needs_openvino
@pytest.mark.skipif(sys.platform != "linux", reason="the plugin sets signal stacks on Linux alone")
def test_the_signal_stack_of_the_thread_stays_as_it_was(
    segments: dict[str, Segment], tmp_path: Path
) -> None:
    """The plugin's own has room for two signals: a third at the same time ended the process."""
    segment = segments["block_out"]
    onnx = export_segment(segment, varying=True)

    def stacks() -> tuple[tuple[int | None, int, int], ...]:
        before = signal_stack()
        openvino.build(segment.spec, onnx, tmp_path / "engine")
        built = signal_stack()
        engine = openvino.load(segment.spec, tmp_path / "engine", CPU)
        require_parity("block_out", check_parity(engine, segment.module, CPU))
        return before, built, signal_stack()

    with ThreadPoolExecutor(max_workers=1) as thread:  # that has had no engine yet
        before, *after = thread.submit(stacks).result()
    assert after == [before, before]


@needs_openvino
@pytest.mark.parametrize(
    "use",
    [
        "from pw_engines import openvino; openvino._bindings().Core()",
        # `pw doctor` and benchmarks import every package to see whether it works.
        "from pw_runtime.system.packages import inspect_package as look; look('openvino')",
    ],
)
def test_no_connection_is_opened(use: str) -> None:
    """OpenVINO's telemetry would report its import, from a fork that holds the same output."""
    watch = "import sys; sys.addaudithook(lambda e, a: e == 'socket.getaddrinfo' and print(a))\n"
    ended = subprocess.run([sys.executable, "-c", watch + use], check=True, capture_output=True)
    assert ended.stdout == b""


def test_it_is_for_cpus_and_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "use --device cpu" in str(openvino.unavailable(torch.device("cuda")))
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "pixelwizard-runtime[openvino]"' in str(openvino.unavailable(CPU))


def test_a_folder_that_is_named_like_it_is_no_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen: a checkout of OpenVINO in the working folder ended every run on a CPU."""

    def missing(name: str) -> str:
        raise openvino.importlib.metadata.PackageNotFoundError(name)

    (tmp_path / "openvino").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(openvino.importlib.metadata, "version", missing)
    assert openvino.importlib.util.find_spec("openvino") is not None
    reason = str(openvino.unavailable(CPU))
    assert "no package of this name is installed" in reason
    assert openvino.INSTALL in reason


def test_a_broken_installation_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libopenvino.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    monkeypatch.setattr(openvino.importlib, "import_module", fail)
    with pytest.raises(EngineError, match=r"cannot be imported \(libopenvino\.so"):
        openvino._bindings()
    assert "openvino_telemetry" not in sys.modules


def test_an_engine_is_for_one_version_processor_and_export(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino.importlib.metadata, "version", lambda name: "2026.4.1")
    facts = dict(openvino.openvino_platform(CPU))
    assert facts["openvino"] == "2026.4.1"
    assert facts.keys() == {"openvino", "torch", "machine", "processor", "recipe"}
    monkeypatch.setattr(openvino, "RECIPE", "of another export")
    assert dict(openvino.openvino_platform(CPU))["recipe"] != facts["recipe"]
