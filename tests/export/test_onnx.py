# SPDX-License-Identifier: Apache-2.0
"""The ONNX models of the segments compute the same as the segments, without PyTorch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pw_engines import EngineSpec, tensorrt
from pw_engines.engine import EngineError, random_inputs
from pw_export import onnx_export
from pw_export.onnx_check import LARGEST, check_onnx
from pw_export.onnx_export import export_onnx, export_segment
from pw_kernels.op import using
from pw_runtime.errors import BadRequest
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.types import Blocks, Precision
from tests.closeness import relative_l2
from tests.engines.tensorrt.segments import aligned
from tests.export.runners import run_reference, run_widened
from tests.networks import TINY_DRAFT, TINY_HIGHRES

CPU = torch.device("cpu")
TOKENS = 48
FP32, BF16 = 1e-6, 1e-2  # relative L2; measured: at most 3e-7 and 6e-3


@cache
def segments(precision: Precision) -> dict[str, Segment]:
    """List every segment of the two networks, which differ in modulation and adapter."""
    draft = segments_of(TINY_DRAFT, precision, TOKENS)
    every: dict[str, Segment] = {}
    for blocks in get_args(Blocks):
        every |= segments_of(TINY_HIGHRES, precision, TOKENS, blocks=blocks, tokens=TOKENS)
    return every | {"draft": draft["modulation"]}


@cache
def exported(precision: Precision, name: str) -> bytes:
    return export_segment(segments(precision)[name])


def inputs_of(spec: EngineSpec, **sizes: int) -> list[Tensor]:
    return random_inputs(spec, dict(spec.limits) | sizes, CPU, seed=0)


def in_fp32(name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run the segment of the fp32 network, which rounds nothing."""
    segment = segments("fp32")[name.removesuffix("_first")]  # of bf16 networks alone
    wide = (x.float() if x.is_floating_point() else x for x in inputs)
    results: tuple[Tensor, ...] = segment.module(*wide)
    return results


def distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_l2(a, b) for a, b in zip(got, expected, strict=True))


EVERY = [(precision, name) for precision in ("fp32", "bf16") for name in segments(precision)]


@pytest.mark.parametrize(("precision", "name"), EVERY)
def test_a_model_computes_what_its_segment_does(precision: Precision, name: str) -> None:
    segment, model = segments(precision)[name], exported(precision, name)
    check_onnx(model, segment.spec)
    inputs = inputs_of(segment.spec)
    exact = in_fp32(name, inputs)
    assert distance(run_widened(model, inputs), exact) < FP32
    rounded = run_reference(model, inputs)
    assert [x.dtype for x in rounded] == [x.dtype for x in segment.module(*inputs)]
    assert distance(rounded, exact) < (FP32 if precision == "fp32" else BF16)


@pytest.mark.parametrize(("precision", "name"), EVERY)
def test_a_model_has_products_of_its_inputs_and_no_weights(precision: Precision, name: str) -> None:
    spec = segments(precision)[name].spec
    graph = onnx.load_model_from_string(exported(precision, name)).graph
    matrices = {x.name for x in spec.inputs if x.name.endswith("weight") and len(x.shape) > 1}
    if name == "embed":  # a convolution that is a product: its weight is given another shape
        matrices = {"view"}
    products = [node for node in graph.node if node.op_type == "Gemm"]
    assert {node.input[1] for node in products} == matrices
    assert len(products) == len(matrices)
    sizes = [numpy_helper.to_array(constant).nbytes for constant in graph.initializer]
    assert max(sizes, default=0) <= 4096


def test_the_last_tokens_of_4k_have_their_positions() -> None:
    segment = segments("fp32")["block_in"]
    inputs = inputs_of(segment.spec)
    inputs[4] = torch.tensor([31 * 67 * 120 - TOKENS, 67, 120])
    got = run_widened(exported("fp32", "block_in"), inputs)
    assert distance(got, segment.module(*inputs)) < FP32


@pytest.mark.parametrize("name", ["block_in", "block_out"])
def test_sizes_may_vary(name: str) -> None:
    segment = segments("bf16")[name]
    model = export_segment(segment, varying=True)
    graph = onnx.load_model_from_string(model).graph
    ports = [x.type.tensor_type.shape.dim for x in (*graph.input, *graph.output)]
    shapes = [tuple(dim.dim_param or dim.dim_value for dim in dims) for dims in ports]
    assert shapes == [x.shape for x in (*segment.spec.inputs, *segment.spec.outputs)]
    for tokens in (2, 31, TOKENS):
        inputs = inputs_of(segment.spec, tokens=tokens, text=tokens + 1)
        assert distance(run_widened(model, inputs), in_fp32(name, inputs)) < FP32


def test_the_same_code_gives_the_same_bytes_without_output(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    segment, first = segments("bf16")["block_out"], exported("bf16", "block_out")
    with using("triton"):
        assert export_segment(segment) == first
    assert b".py" not in first  # nor a path of any machine
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []
    metadata = {x.key: x.value for x in onnx.load_model_from_string(first).metadata_props}
    assert metadata["pixelwizard.segment"] == "block_out"
    assert metadata["pixelwizard.sources"] == segment.spec.sources


def test_two_networks_share_what_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(*arguments: Any) -> dict[str, Segment]:
        everything = segments_of(*arguments)
        return {name: everything[name] for name in ("embed", "modulation")}

    monkeypatch.setattr(onnx_export, "segments_of", few)
    networks = {"draft": TINY_DRAFT, "highres": TINY_HIGHRES}
    lines: list[str] = []
    out = tmp_path / "models"
    export_onnx(networks, "bf16", TOKENS, out, lines.append)
    names = ["draft/embed", "draft/modulation", "highres/modulation"]
    assert [line.split(":")[0] for line in lines] == names
    index = json.loads((out / "index.json").read_text())
    assert index["opset"] == 20
    files = [f"{network}/{name}.onnx" for network in networks for name in ("embed", "modulation")]
    assert [entry["file"] for entry in index["models"]] == files
    for entry in index["models"]:
        assert hashlib.sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    spec = few(TINY_HIGHRES, "bf16", TOKENS)["modulation"].spec
    described = {key: index["models"][-1][key] for key in asdict(spec)}
    assert described == json.loads(json.dumps(asdict(spec)))
    with pytest.raises(BadRequest, match="exists already"):
        export_onnx(networks, "bf16", TOKENS, out, lines.append)
    assert len(lines) == 3


def changed(model: bytes, change: Any) -> bytes:
    edited = onnx.load_model_from_string(model)
    change(edited)
    return edited.SerializeToString()


def test_what_tensorrt_cannot_take_is_refused() -> None:
    model, spec = exported("fp32", "head"), segments("fp32")["head"].spec

    def other_operator(edited: Any) -> None:
        node = next(node for node in edited.graph.node if node.op_type == "Mul")
        node.op_type = "Mod"
        node.attribute.append(onnx.helper.make_attribute("fmod", 1))

    def other_opset(edited: Any) -> None:
        edited.opset_import[0].version = 25

    def full(edited: Any) -> None:
        edited.graph.doc_string = " " * LARGEST

    for change, message in (
        (other_operator, r"\(Mod\): operator not in the table"),
        (other_opset, "opset 25, expected 9 to 24"),
        (full, "bytes, expected at most"),
    ):
        with pytest.raises(EngineError, match=message):
            check_onnx(changed(model, change), spec)


def test_a_model_of_another_segment_is_refused() -> None:
    model, spec = exported("fp32", "head"), segments("fp32")["head"].spec
    x, *others = spec.inputs
    with pytest.raises(
        EngineError, match=r"does not fit head:\n  inputs: expected rows, .*, got x, r"
    ):
        check_onnx(model, replace(spec, inputs=(*others,)))
    narrow = replace(x, dtype="bf16", shape=("tokens", 8))
    with pytest.raises(EngineError) as caught:
        check_onnx(model, replace(spec, inputs=(narrow, *others)))
    assert "input x: expected BFLOAT16, got FLOAT" in str(caught.value)
    assert "input x: expected ('tokens', 8) or (48, 8), got (48, 128)" in str(caught.value)

    def renamed(edited: Any) -> None:
        edited.graph.output[0].name = "other"
        edited.graph.node[-1].output[0] = "other"

    with pytest.raises(EngineError, match="outputs: expected out, got other"):
        check_onnx(changed(model, renamed), spec)


class Unknown(nn.Module):
    """An operation that ONNX lacks."""

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor]:
        return (torch.igamma(x, x),)


def test_failures_say_which_segment_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = segments("fp32")["head"]
    with pytest.raises(EngineError, match="PyTorch cannot export head to ONNX"):
        export_segment(replace(segment, module=Unknown()))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(EngineError, match=r"needs a package \(.*onnxscript.*\): pip install"):
        export_segment(segment)


@pytest.mark.parametrize("name", ["block_in", "block_out"])
def test_from_segment_to_engine(name: str, trt: Any, tmp_path: Path) -> None:
    segment, path = segments("bf16")[name], tmp_path / tensorrt.FILE
    spec = segment.spec
    tensorrt.build(spec, exported("bf16", name), path, CPU, say=lambda line: None)
    engine = tensorrt.load(spec, path, CPU)
    inputs = [aligned(x) for x in inputs_of(spec)]
    expected = segment.module(*inputs)
    outputs = [aligned(torch.full_like(x, float("nan"))) for x in expected]
    engine.run(inputs, outputs)
    assert distance(outputs, expected) < BF16
