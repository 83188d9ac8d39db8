# SPDX-License-Identifier: Apache-2.0
"""Writes into slices become concatenations that TensorRT supports, with equal results."""

from __future__ import annotations

import onnx
import onnxscript
import pytest
import torch
from torch import Tensor, nn

from pw_engines.engine import random_inputs, relative_l2
from pw_engines.tensorrt.onnx_rules import check_importable
from pw_export.onnx_check import check_onnx
from pw_export.onnx_export import export_segment
from pw_export.onnx_scatter import ScatterRewriter
from pw_runtime.execution.decoder_segments import segments_of_vae
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.models import VaeDecoder
from tests.export.runners import run_reference
from tests.networks import SMALLEST_VAE


def exported(module: nn.Module, inputs: list[Tensor]) -> bytes:
    program = torch.onnx.export(
        module.eval(),
        tuple(inputs),
        dynamo=True,
        verbose=False,
        opset_version=20,
        custom_translation_table=ScatterRewriter(onnxscript.opset20).table(),
    )
    assert program is not None
    return program.model_proto.SerializeToString()


class Filled(nn.Module):
    """Every kind of write in the networks, also one over another."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        buffer = torch.empty(5, 4)
        buffer[:2] = x[:2]
        buffer[-3:] = y
        late = buffer.clone()
        late[1:4] = x  # covers parts of both
        late[3:, 1:3] = 7
        doubled = torch.empty(6, 8)
        for row in range(2):
            for column in range(2):
                doubled[row::2, column::2] = x * (1 + row + 2 * column)
        frames = torch.zeros(3, 4)
        for part, result in zip(y.split(2), frames.split(2), strict=True):
            result.copy_(part + 1)
        frames[-1].add_(x[0])
        frames[3:].add_(1)  # nothing
        return buffer, late, doubled, frames


def test_all_kinds_of_writes() -> None:
    inputs = [torch.randn(3, 4), torch.randn(3, 4)]
    model = exported(Filled(), inputs)
    check_importable(model)
    for got, expected in zip(run_reference(model, inputs), Filled()(*inputs), strict=True):
        assert torch.equal(got, expected)


class Buffer(nn.Module):
    """The buffer of a convolution: the past, then the frames."""

    def forward(self, past: Tensor, x: Tensor) -> Tensor:
        buffer = torch.empty(5, 4)
        buffer[:2] = past
        buffer[-3:] = x
        return buffer


def test_what_a_write_covers_is_not_concatenated() -> None:
    model = onnx.load_model_from_string(exported(Buffer(), [torch.ones(2, 4), torch.ones(3, 4)]))
    (node,) = model.graph.node
    assert node.op_type == "Concat"
    assert list(node.input) == [tensor.name for tensor in model.graph.input]


def assert_computes(segment: Segment, model: bytes) -> None:
    inputs = random_inputs(segment.spec, {}, torch.device("cpu"), seed=0)
    with torch.inference_mode():
        expected = segment.module(*inputs)
    for result, tensor in zip(run_reference(model, inputs), expected, strict=True):
        assert relative_l2(result, tensor) <= 1e-5


@pytest.mark.slow
def test_the_vae_with_its_weights_is_importable_and_right() -> None:
    torch.manual_seed(0)
    decoder = VaeDecoder(SMALLEST_VAE).requires_grad_(False)
    segment = segments_of_vae(SMALLEST_VAE, 2, 3, baked=decoder)["vae_fine_next"]
    model = export_segment(segment)
    check_importable(model, weights_inside=True)
    assert_computes(segment, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coarse_first", "coarse_next", "fine_first", "fine_next"])
def test_the_decoder_is_exported_with_its_weights_as_inputs(name) -> None:
    """Seen: the past before a clip stood in the model as constants of 8 MB of zeros."""
    segment = segments_of_vae(SMALLEST_VAE, 4, 6)[f"vae_{name}"]
    model = export_segment(segment)
    check_onnx(model, segment.spec)
    assert len(model) < 2**16
    assert_computes(segment, model)
