# SPDX-License-Identifier: Apache-2.0
"""The first real self-check of TensorRT for RTX, with it and a GPU of its list: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from pw_engines.engine import check_parity, require_parity
from pw_engines.spec import DType
from pw_engines.tensorrt import rtx
from pw_engines.tensorrt.engine import TensorrtEngine
from pw_engines.tensorrt.plan_file import read_facts
from pw_export.onnx_export import export_segment
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.types import Blocks, DitConfig
from tests.closeness import relative_l2
from tests.engines.tensorrt.segments import data, function, onnx_of, spec
from tests.engines.test_segments import network

GPU = torch.device("cuda", 0)
WIDE = DitConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=16)
TOKENS = 256
REASON = rtx.cannot_run(GPU)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


def opened(folder: Path, dtype: DType = "bf16", *targets: str) -> TensorrtEngine:
    """Build a plan for this GPU, and for `targets`, unless the folder has one; open it."""
    path = folder / rtx.FILE
    if not path.exists():
        rtx.build(spec(dtype), onnx_of(spec(dtype)), path, [rtx.target_of(GPU), *targets])
    return rtx.load(spec(dtype), path, GPU)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_plan_computes_what_its_segment_does(dtype: DType, tmp_path: Path) -> None:
    require_parity("up", check_parity(opened(tmp_path, dtype), function, GPU))


def test_a_plan_for_several_targets_runs(tmp_path: Path) -> None:
    others = [target for target in rtx.RTX.targets if target != rtx.target_of(GPU)]
    require_parity("up", check_parity(opened(tmp_path, "bf16", *others), function, GPU))


def test_every_size_runs_and_gives_the_same_bits_again(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    for tokens in (24, 2, 7, 24):
        inputs, outputs, expected = data(spec(tokens=tokens), "cuda")
        engine.run(inputs, outputs)
        assert relative_l2(outputs[0], expected) < 2e-2
        first = outputs[0].clone()
        engine.run(inputs, outputs)
        assert torch.equal(outputs[0], first)


def test_kernels_of_the_first_run_are_loaded_by_the_next_process(tmp_path: Path) -> None:
    first = opened(tmp_path)
    rtx.check_first_run(first, function, GPU)
    assert first.kernels is not None
    assert first.kernels.path.stat().st_size > 0
    again = opened(tmp_path)
    assert again.kernels is not None
    assert again.kernels.loaded


def test_scratch_memory_is_what_the_builder_said(tmp_path: Path) -> None:
    assert opened(tmp_path).scratch == read_facts(tmp_path / rtx.FILE).scratch


def test_a_captured_graph_gives_the_same_bits(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    inputs, outputs, _ = data(spec(), "cuda")
    engine.run(inputs, outputs)
    expected = outputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run(inputs, outputs)
    outputs[0].fill_(float("nan"))
    graph.replay()
    assert torch.equal(outputs[0], expected)


@pytest.mark.parametrize("blocks", get_args(Blocks))
def test_every_division_of_a_block_computes_what_the_segments_do(
    blocks: Blocks, tmp_path: Path
) -> None:
    net = network(WIDE, "bf16").to(GPU)
    segments = segments_of(WIDE, "bf16", TOKENS, blocks=blocks, tokens=TOKENS)
    engines = {}
    for name, segment in segments.items():
        model = export_segment(segment, varying=True)
        rtx.build(segment.spec, model, tmp_path / name, [rtx.target_of(GPU)])
        engines[name] = rtx.load(segment.spec, tmp_path / name, GPU)
    eager = segments_of(WIDE, "bf16", TOKENS)
    latent, t = torch.randn(48, 4, 16, 16, device=GPU), torch.tensor([700.0], device=GPU)
    context = torch.randn(7, WIDE.text_dim, device=GPU)
    results = []
    for dit in (
        SegmentedDiT(net, segments, engines),
        SegmentedDiT(net, eager, eager_engines(eager)),
    ):
        with torch.inference_mode():
            texts = [dit.text_keys_values(context)]
            results += dit.velocities(latent, texts, dit.modulation(t), dit.layout(latent))
    assert relative_l2(*results) < 2e-2
