# SPDX-License-Identifier: Apache-2.0
"""The front end torch-tensorrt: what it is asked for, whose tensor is whose, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pw_engines import tensorrt
from pw_engines.engine import EngineError
from pw_engines.tensorrt import torch_tensorrt
from pw_engines.tensorrt.library import TensorInfo, match_by_order
from pw_engines.tensorrt.plan_file import PlanFacts, append_facts, read_facts, split_plan
from pw_engines.tensorrt.request import Request
from pw_engines.tensorrt.torch_tensorrt_build import build_plan, settings
from tests.closeness import relative_l2
from tests.engines.tensorrt.fake_torch_tensorrt import FITTING, RECORD, THEIRS, make, plan_of
from tests.engines.tensorrt.segments import HIDDEN, TOKENS, WIDTH, data, function, spec
from tests.engines.tensorrt.simulated import FAULT
from tests.engines.tensorrt.torch_tensorrt_api import known

CPU = torch.device("cpu")
GPU = torch.device("cuda")


class Up(nn.Module):
    """The small segment."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return function(*inputs)


@pytest.fixture
def front(simulate: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """TensorRT and torch-tensorrt that fit each other, here and in child processes."""
    simulate(FITTING)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", make("2.13.0"))
    return monkeypatch


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    program = torch_tensorrt.export(spec(), Up(), CPU)
    torch.export.save(program, tmp_path / "program.pt2")
    return Request(spec=spec(), model=tmp_path / "program.pt2", plan=tmp_path / "plan", device=None)


def build(path: Path, say: Callable[[str], None] = lambda line: None) -> None:
    torch_tensorrt.build(spec(), Up(), path, CPU, say=say)


def test_a_request_survives_its_file(request_of: Request) -> None:
    assert Request.from_json(request_of.to_json()) == request_of


def test_a_program_is_of_the_limits_and_leaves_its_examples_behind(
    request_of: Request,
) -> None:
    program = torch.export.load(request_of.model)
    placeholders = program.graph.find_nodes(op="placeholder")
    assert [tuple(node.meta["val"].shape) for node in placeholders] == [
        (TOKENS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,),
    ]  # fmt: skip
    assert program.example_inputs is None


@pytest.mark.parametrize("version", known())
def test_every_setting_exists_and_asks_for_a_whole_and_exact_plan(
    version: str, request_of: Request
) -> None:
    keywords = settings(make(version), request_of)
    assert keywords.keys() <= set(known()[version])
    assert keywords["require_full_compilation"] is True
    assert keywords["disable_tf32"] is True
    assert keywords["attn_bias_is_causal"] is False
    assert keywords["arg_inputs"][0] == ((TOKENS, WIDTH), torch.bfloat16)
    assert Path(keywords["timing_cache_path"]).parent == request_of.plan.parent
    # weak typing is the default of old versions; the newest takes the word and does not know it
    assert keywords.get("use_explicit_typing") is (
        True if version in ("2.11.0", "2.12.0") else None
    )


def test_a_setting_that_a_version_lacks_is_an_error(request_of: Request) -> None:
    fake = make("2.13.0")

    def takes_anything(program: Any, arg_inputs: Any, device: Any, **rest: Any) -> bytes:
        raise AssertionError("it must not be called")

    fake.dynamo = type("dynamo", (), {next(iter(vars(fake.dynamo))): takes_anything})
    with pytest.raises(EngineError, match=r"2\.13\.0 has no setting require_full_compilation"):
        settings(fake, request_of)


def test_from_build_process_to_result(front: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []
    front.setenv(RECORD, str(tmp_path / "record.json"))
    path = tmp_path / tensorrt.FILE
    build(path, lines.append)
    assert {file.name for file in tmp_path.iterdir()} == {tensorrt.FILE, "record.json"}
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["placeholders"] == list(THEIRS.values())[:3]
    assert record["device"] == "cuda:0"
    engine = tensorrt.load(spec(), path, CPU)
    inputs, outputs, expected = data(spec())
    engine.run(inputs, outputs)
    assert relative_l2(outputs[0], expected) < 1e-2
    assert [line.split(":")[0].split(" in ")[0] for line in lines] == [
        "building up with TensorRT", "built up",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "unsupported",
            r"2\.13\.0 cannot build up: no converter for torch\.ops\.aten\.special_bessel_j0"
            r"\.default, torch\.ops\.aten\.special_i0e\.default\n(?s:.*)what TensorRT says itself",
        ),
        ("killed", r"the build of up was killed \(signal 9\), .*\n  got to: \d\.\d GiB"),
    ],
)
def test_a_build_process_that_fails_leaves_a_message_and_nothing_else(
    fault: str, message: str, front: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    front.setenv(FAULT, fault)
    with pytest.raises(EngineError, match=message):
        build(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no engine", r"cannot build up: AssertionError: cuda_engine$"),
        ("no bytes", r"cannot build up: expected a plan, got NoneType"),
        ("other sizes", r"x, there inputs_0: expected shape \(24, 32\), got \(24, 8\)"),
    ],
)
def test_what_is_no_plan_of_the_segment_is_refused(
    fault: str, message: str, front: pytest.MonkeyPatch, request_of: Request
) -> None:
    front.setenv(FAULT, fault)
    with pytest.raises(EngineError, match=message):
        build_plan(request_of)
    assert not request_of.plan.exists()


def test_a_package_that_cannot_be_imported_is_reported(
    front: pytest.MonkeyPatch, request_of: Request
) -> None:
    front.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(EngineError, match=r"cannot be imported \(.*use --frontend onnx"):
        build_plan(request_of)


def infos(*tensors: tuple[str, bool, str, tuple[int, ...]]) -> list[TensorInfo]:
    keys = ("name", "is_input", "dtype", "shape")
    return [TensorInfo(**dict(zip(keys, values, strict=True))) for values in tensors]  # type: ignore[arg-type]


IN = (
    ("inputs_0", True, "bf16", (TOKENS, WIDTH)),
    ("inputs_1", True, "bf16", (HIDDEN, WIDTH)),
    ("inputs_2", True, "bf16", (HIDDEN,)),
)
OUT = ("output0", False, "bf16", (TOKENS, HIDDEN))


def test_tensors_are_matched_by_their_order_whatever_they_are_called() -> None:
    names = ("inputs_0", "inputs_1", "inputs_2", "output0")
    assert match_by_order(spec(), infos(*IN, OUT), "the plan") == names
    assert match_by_order(spec(), infos(OUT, *IN), "the plan") == names


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            (*IN[:2], OUT),
            r"the plan does not have .*\n  expected 3 inputs, got 2",
        ),
        ((*IN, OUT, OUT), r"expected 1 outputs, got 2"),
        ((IN[1], IN[0], IN[2], OUT), r"x, there inputs_1: expected shape"),
        ((("inputs_0", True, "fp32", (TOKENS, WIDTH)), *IN[1:], OUT), r"expected bf16, got fp32"),
    ],
)
def test_another_number_order_or_dtype_is_refused(tensors: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        match_by_order(spec(), infos(*tensors), "the plan")


def test_names_end_the_file_and_tensorrt_does_not_see_them(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(b"plan")
    assert split_plan(path.read_bytes()) == (b"plan", PlanFacts())
    facts = PlanFacts(names=("inputs_0", "output0"), scratch=7)
    append_facts(path, facts)
    assert read_facts(path) == facts
    plan, stored = split_plan(path.read_bytes())
    assert (bytes(plan), stored) == (b"plan", facts)


def test_a_plan_with_other_names_than_it_was_built_with_is_refused(
    front: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "plan"
    path.write_bytes(plan_of(THEIRS))
    append_facts(path, PlanFacts(names=("a", "b", "c", "d")))
    with pytest.raises(EngineError, match="does not have the tensor names it was built with"):
        tensorrt.load(spec(), path, CPU)


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("pytorch", "version", "library", "message"),
    [
        ("2.13.0+cu132", lambda name: "2.13.0", FITTING, None),
        (
            "2.13.0+cu132", missing, FITTING,
            'torch-tensorrt is not installed: pip install "torch-tensorrt==2.13.*" '
            '"tensorrt==11.0.*"',
        ),
        (
            "2.12.1", lambda name: "2.13.0", "10.16.1.11",
            "torch-tensorrt 2.13.0 is installed, expected 2.12 for PyTorch 2.12.1: pip install "
            '"torch-tensorrt==2.12.*" "tensorrt==10.16.*"',
        ),
        (
            "2.13.0", lambda name: "2.13.0", "11.4.0.106",
            "TensorRT 11.4.0.106 is installed, expected 11.0 for torch-tensorrt 2.13.0: pip "
            'install "torch-tensorrt==2.13.*" "tensorrt==11.0.*", or use --frontend onnx',
        ),
        (
            "2.99.0", lambda name: "2.13.0", FITTING,
            "no torch-tensorrt is known for PyTorch 2.99.0, expected PyTorch 2.11, 2.12, 2.13, "
            "2.14: use --frontend onnx",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_reported_with_what_would(
    pytorch: str,
    version: Callable[[str], str],
    library: str,
    message: str | None,
    simulate: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate(library)
    monkeypatch.setattr(torch, "__version__", pytorch)
    monkeypatch.setattr(torch_tensorrt, "version", version)
    assert torch_tensorrt.unavailable(GPU) == message


def test_other_devices_are_refused_first() -> None:
    assert "TensorRT runs on NVIDIA GPUs" in str(torch_tensorrt.unavailable(CPU))


def test_the_platform_needs_no_torch_tensorrt(front: pytest.MonkeyPatch) -> None:
    front.setattr(torch_tensorrt, "version", missing)
    own = {"recipe": torch_tensorrt.RECIPE}  # the other one is that of the ONNX models
    assert dict(torch_tensorrt.torch_platform(GPU)) == dict(tensorrt.tensorrt_platform(GPU)) | own
