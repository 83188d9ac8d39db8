# SPDX-License-Identifier: Apache-2.0
"""A small segment three times: its spec, its ONNX model, and the same in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional

from pw_engines.spec import DTYPES, DType, EngineSpec, TensorSpec

KINDS = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
TOKENS, WIDTH, HIDDEN = 24, 32, 64


def spec(dtype: DType = "bf16", *, tokens: int = TOKENS, width: int = WIDTH) -> EngineSpec:
    """x [tokens, width] -> gelu(x W^T + b) [tokens, HIDDEN]; the weights are inputs."""
    return EngineSpec(
        segment="up",
        inputs=(
            TensorSpec(name="x", dtype=dtype, shape=("tokens", width)),
            TensorSpec(name="weight", dtype=dtype, shape=(HIDDEN, width)),
            TensorSpec(name="bias", dtype=dtype, shape=(HIDDEN,)),
        ),
        outputs=(TensorSpec(name="y", dtype=dtype, shape=("tokens", HIDDEN)),),
        limits=(("tokens", tokens),),
        sources="0",
    )


def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The segment in PyTorch."""
    return (functional.gelu(functional.linear(x, weight, bias), approximate="tanh"),)


def nodes() -> list[Any]:
    """The segment in ONNX."""
    return [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["h"], name="project", transB=1),
        helper.make_node("Gelu", ["h"], ["y"], name="activate", approximate="tanh"),
    ]


def onnx_of(
    engine_spec: EngineSpec,
    own_nodes: list[Any] | None = None,
    *,
    opset: int = 20,
    ir: int = 10,
    initializers: tuple[Any, ...] = (),
    fixed: bool = False,
) -> bytes:
    """An ONNX model with the inputs and outputs of a spec; named dimensions stay named."""
    limits = dict(engine_spec.limits)
    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                tensor.name, KINDS[tensor.dtype], tensor.sized(limits) if fixed else tensor.shape
            )
            for tensor in tensors
        ]
        for tensors in (engine_spec.inputs, engine_spec.outputs)
    )
    graph = helper.make_graph(
        nodes() if own_nodes is None else own_nodes,
        engine_spec.segment,
        inputs,
        outputs,
        initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir).SerializeToString()


def aligned(x: Tensor) -> Tensor:
    """A copy at an address of a multiple of 256 bytes, as every tensor of its own has on a GPU."""
    size = x.numel() * x.element_size()
    memory = torch.empty(size + 256, dtype=torch.uint8, device=x.device)
    start = -memory.data_ptr() % 256
    return memory[start : start + size].view(x.dtype).view(x.shape).copy_(x)


def data(
    engine_spec: EngineSpec, device: str = "cpu", seed: int = 0
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs, outputs full of NaN, and what PyTorch makes of the inputs in fp32."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(engine_spec.limits)
    inputs = [
        aligned(
            torch.randn(tensor.sized(sizes), generator=generator)
            .to(DTYPES[tensor.dtype])
            .to(device)
        )
        for tensor in engine_spec.inputs
    ]
    outputs = [
        aligned(torch.full(t.sized(sizes), float("nan"), dtype=DTYPES[t.dtype], device=device))
        for t in engine_spec.outputs
    ]
    (expected,) = function(*(x.float() for x in inputs))
    return inputs, outputs, expected
