# SPDX-License-Identifier: Apache-2.0
"""Writes into parts of a tensor become joins that TensorRT takes, and compute the same."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnxscript
import pytest
import torch
from torch import Tensor, nn

from pw_engines.engine import random_inputs, relative_l2
from pw_engines.tensorrt.onnx_rules import check_importable
from pw_export.onnx_check import check_onnx
from pw_export.onnx_export import export_segment
from pw_export.onnx_scatter import Writes
from pw_runtime.execution.decoder_segments import segments_of_vae
from pw_runtime.models import VaeDecoder
from tests.export.runners import run_reference
from tests.networks import TINY_VAE


def exported(module: nn.Module, inputs: list[Tensor]) -> bytes:
    program = torch.onnx.export(
        module.eval(),
        tuple(inputs),
        dynamo=True,
        verbose=False,
        opset_version=20,
        custom_translation_table=Writes(onnxscript.opset20).table(),
    )
    assert program is not None
    return program.model_proto.SerializeToString()


class Filled(nn.Module):
    """Every kind of write that the networks make, one over another too."""

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
    for got, wanted in zip(run_reference(model, inputs), Filled()(*inputs), strict=True):
        assert torch.equal(got, wanted)


class Joined(nn.Module):
    """A convolution's buffer: the past, and what is written behind it."""

    def forward(self, past: Tensor, x: Tensor) -> Tensor:
        buffer = torch.empty(5, 4)
        buffer[:2] = past
        buffer[-3:] = x
        return buffer


def test_what_a_write_covers_is_not_joined() -> None:
    model = onnx.load_model_from_string(exported(Joined(), [torch.ones(2, 4), torch.ones(3, 4)]))
    (join,) = (node for node in model.graph.node if node.op_type == "Concat")
    assert len(model.graph.node) == 1
    assert list(join.input) == [one.name for one in model.graph.input]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coarse_next", "fine_first"])
def test_the_vae_with_its_weights_is_importable_and_right(name) -> None:
    torch.manual_seed(0)
    small = replace(TINY_VAE, decoder_blocks=1)
    segment = segments_of_vae(small, 2, 3, baked=VaeDecoder(small).requires_grad_(False))
    made = segment[f"vae_{name}"]
    inputs = random_inputs(made.spec, {}, torch.device("cpu"), seed=0)
    model = exported(made.module, inputs)
    check_importable(model, weights_inside=True)
    wanted = made.module(*inputs)
    for got, want in zip(run_reference(model, inputs), wanted, strict=True):
        assert relative_l2(got, want) <= 1e-5


@pytest.mark.slow
def test_the_decoder_is_exported_with_its_weights_as_inputs() -> None:
    """Seen: the past before a clip stood in the model as constants of 8 MB of zeros."""
    for segment in segments_of_vae(TINY_VAE, 4, 6).values():
        model = export_segment(segment)
        check_onnx(model, segment.spec)
        assert len(model) < 2**17
        inputs = random_inputs(segment.spec, {}, torch.device("cpu"), seed=0)
        with torch.inference_mode():
            wanted = segment.module(*inputs)
        for got, want in zip(run_reference(model, inputs), wanted, strict=True):
            assert relative_l2(got, want) < 1e-5
