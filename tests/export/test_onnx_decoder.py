# SPDX-License-Identifier: Apache-2.0
"""The decoder's ONNX models, written layer by layer, compute what its segments do, with little."""

from __future__ import annotations

import importlib
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

from pw_engines.engine import random_inputs, relative_l2
from pw_engines.tensorrt.library import RTX, bindings
from pw_engines.tensorrt.onnx_build import build_plan
from pw_engines.tensorrt.onnx_rules import check_importable
from pw_engines.tensorrt.plan_file import read_facts
from pw_engines.tensorrt.request import Request
from pw_export.onnx_check import check_onnx
from pw_export.onnx_export import export_segment
from pw_export.wan22_configs import VAE
from pw_runtime.execution.decoder_segments import segments_of_decode, segments_of_vae
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.models import VaeDecoder
from pw_runtime.presets import PRESETS
from tests.export.runners import run_widened
from tests.networks import SMALLEST_VAE, TINY_VAE

# Shortcuts of every kind: a channel for one, for several, several for one, frames doubled or not.
WIDER = replace(SMALLEST_VAE, decoder_dims=(8, 16, 24, 24), temporal_downsample=(False, True))
CONFIGS = {"smallest": SMALLEST_VAE, "tiny": TINY_VAE, "wider": WIDER}
PARTS = ("coarse_first", "coarse_next", "fine_first", "fine_next", "frame")
GIB = 2**30


def assert_computes(segment: Segment, model: bytes) -> None:
    inputs = random_inputs(segment.spec, {}, torch.device("cpu"), seed=0)
    with torch.inference_mode():
        expected = segment.module(*inputs)
    for result, tensor in zip(run_widened(model, inputs), expected, strict=True):
        assert result.shape == tensor.shape
        assert relative_l2(result, tensor) <= 2e-6  # measured: 6e-7


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_computes_what_its_segment_does(config: str, part: str) -> None:
    segment = segments_of_vae(CONFIGS[config], 4, 6)[f"vae_{part}"]
    model = export_segment(segment)
    check_onnx(model, segment.spec)
    assert_computes(segment, model)


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_part_of_a_segment_are_constants_of_its_model(part: str) -> None:
    torch.manual_seed(0)
    decoder = VaeDecoder(SMALLEST_VAE).requires_grad_(False)
    segment = segments_of_vae(SMALLEST_VAE, 2, 3, baked=decoder)[f"vae_{part}"]
    model = export_segment(segment)
    check_importable(model, weights_inside=True)
    graph = onnx.load_model_from_string(model).graph
    constants = {x.name for x in graph.initializer}
    kernels = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    split = {result for node in graph.node if node.op_type == "Split" for result in node.output}
    assert kernels <= constants | split
    assert {node.input[0] for node in graph.node if kernels & set(node.output)} <= constants
    assert_computes(segment, model)


def test_attention_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at full size, where the scores of all rows would be too large."""
    chunked = importlib.import_module("pw_kernels.attention.chunked")
    monkeypatch.setattr(chunked, "SCORE_BYTES", 10 * 24 * 4)
    segment = segments_of_vae(SMALLEST_VAE, 4, 6)["vae_coarse_next"]
    model = export_segment(segment)
    graph = onnx.load_model_from_string(model).graph
    assert sum(node.op_type == "Softmax" for node in graph.node) == 3  # of 10, 10 and 4 rows
    assert_computes(segment, model)


def test_the_same_code_gives_the_same_bytes() -> None:
    first, second = (
        export_segment(segments_of_vae(SMALLEST_VAE, 2, 3)["vae_fine_next"]) for _ in range(2)
    )
    assert first == second
    assert b".py" not in first


@cache
def published(preset: str = "2k") -> dict[str, Segment]:
    """List the segments of the published decoder for a preset; nothing is allocated."""
    size = {"2k": (90, 160), "4k": (134, 240)}[preset]
    return segments_of_decode(VAE, PRESETS[preset].decode, *size)


@pytest.mark.parametrize("name", list(published()))
def test_models_of_the_published_size_are_small_and_written_without_memory(name: str) -> None:
    """Seen: 71 seconds and 9 GiB for tensors of the picture's size that an exporter computed."""
    segment = published()[name]
    tracemalloc.start()
    try:
        model = export_segment(segment)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20
    check_onnx(model, segment.spec)
    assert len(model) < 2**17
    kinds = [node.op_type for node in onnx.load_model_from_string(model).graph.node]
    assert len(kinds) < 800
    assert "Slice" not in kinds  # of which the parser of TensorRT makes 27 layers each


# Layers that the parser made of what PyTorch exported: the fine part and the frames were one graph.
LAYERS = {"coarse_first": 3000, "coarse_next": 3303, "fine_first": 5242, "fine_next": 5674}


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("targets", [("sm_89",), RTX.targets])
@pytest.mark.parametrize("part", PARTS)
def test_2k_is_built_in_6_gib_of_scratch_memory(
    part: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    trt = pytest.importorskip(RTX.modules[0])
    name = f"vae_{part}_90x{160 if part.startswith('coarse') else 65}"
    segment = published()[name]
    model = tmp_path / "model.onnx"
    model.write_bytes(export_segment(segment))
    request = Request(
        spec=segment.spec,
        model=model,
        plan=tmp_path / "plan",
        device=None,
        library="tensorrt-rtx",
        targets=targets,
    )
    build_plan(request)
    assert 0 < (read_facts(request.plan).scratch or 0) < 6 * GIB
    logger = trt.Logger(trt.Logger.ERROR)
    network = bindings(RTX).Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse(model.read_bytes())
    assert network.num_layers < LAYERS.get(part, LAYERS["fine_first"]) / 4


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("name", ["vae_fine_next_134x42", "vae_frame_134x42"])
def test_4k_is_built_in_6_gib_of_scratch_memory(name: str, tmp_path: Path) -> None:
    pytest.importorskip(RTX.modules[0])
    segment = published("4k")[name]
    request = Request(
        spec=segment.spec,
        model=tmp_path / "model.onnx",
        plan=tmp_path / "plan",
        device=None,
        library="tensorrt-rtx",
        targets=RTX.targets,
    )
    request.model.write_bytes(export_segment(segment))
    build_plan(request)
    assert 0 < (read_facts(request.plan).scratch or 0) < 6 * GIB
