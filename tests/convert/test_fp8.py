# SPDX-License-Identifier: Apache-2.0
"""fp8 weights with scales become what they stand for; without scales they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_export.convert import convert
from pw_runtime.errors import BadWeights
from tests.convert.layouts import State, holds, official_state, quietly
from tests.oracle.checkpoint import Checkpoint

E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> State:
    """Load a draft network with clean names."""
    return official_state(checkpoint.base)["draft"]


def quantised(state: State, dtype: torch.dtype, names: str, *, rows: bool) -> tuple[State, State]:
    """Quantise the matrices of the blocks.

    `names` is "old" for scale_weight and the marker, "new" for weight_scale and comfy_quant.

    Returns:
        The tensors of the file, and those that a bundle must hold.
    """
    stored, meant = dict(state), dict(state)
    for name, weight in state.items():
        if not (name.startswith("blocks.") and weight.dim() == 2):
            continue
        largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
        scale = largest / torch.finfo(dtype).max
        stored[name] = (weight / scale).to(dtype)
        meant[name] = stored[name].float() * scale
        layer = name.removesuffix("weight")
        stored[layer + ("scale_weight" if names == "old" else "weight_scale")] = scale
        stored[layer + ("scale_input" if names == "old" else "input_scale")] = torch.ones(())
        if names == "new":
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if names == "old":
        stored["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    return stored, meant


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_weights_are_multiplied_by_their_scales_bit_for_bit(
    prefix: str,
    rows: bool,
    names: str,
    dtype: torch.dtype,
    plain: State,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    stored, meant = quantised(plain, dtype, names, rows=rows)
    file = tmp_path / "d.safetensors"
    save_file({prefix + name: tensor for name, tensor in stored.items()}, file)
    lines: list[str] = []
    bundle = convert(wan=checkpoint.base, draft=file, out=tmp_path / "b", say=lines.append)
    assert holds(bundle, "draft", meant)
    count = sum(tensor.dtype == dtype and tensor.dim() == 2 for tensor in stored.values())
    said = [line for line in lines if line.startswith("d.safetensors: ")]
    assert said[0] == (
        f"d.safetensors: {count} fp8 tensors, multiplied by their scales and kept as float32"
    )
    assert f"{count} {'scale_input' if names == 'old' else 'input_scale'}" in said[1]


def test_scale_of_one_beside_a_full_precision_weight_changes_nothing(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    torch.save({**plain, "blocks.0.ffn.0.scale_weight": torch.ones(1)}, tmp_path / "d.pt")
    assert holds(
        quietly(tmp_path / "b", wan=checkpoint.base, draft=tmp_path / "d.pt"), "draft", plain
    )


def _raw(state: State) -> State:
    return {n: t.to(E4M3) if t.dim() == 2 else t for n, t in state.items()}


def _with(**changes: torch.Tensor) -> Callable[[State], State]:
    return lambda state: {
        **quantised(state, E4M3, "old", rows=False)[0],
        **{f"blocks.0.ffn.0.{name}": tensor for name, tensor in changes.items()},
    }


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (_raw, ["fp8 weights without scales", "float8_e4m3fn tensors: ", "fp16 or bf16 file"]),
        (
            lambda state: {**state, "head.head.bias": state["head.head.bias"].to(E4M3)},
            ["fp8 weights without scales", "1 float8_e4m3fn", "head.head.bias"],
        ),
        (_with(scale_weight=torch.ones(2, 3)), ["not read", "with a scale of shape [2, 3]"]),
        (_with(scale_weight=torch.ones(96)), ["not read", "with a scale of shape [96]"]),
        (_with(weight=torch.zeros(208, 96).char()), ["not read", "int8 with a scale"]),
        (_with(weight=torch.zeros(208, 48).byte()), ["not read", "uint8 with a scale"]),
        (_with(weight=torch.zeros(208, 96)), ["a scale for a weight that is not fp8"]),
        (_with(scale_weight=torch.tensor(float("nan"))), ["blocks.0.ffn.0.weight (19,968 NaN"]),
        (lambda state: {**state, "x.scale_weight": torch.ones(1)}, ["x.scale_weight"]),
    ],
)
def test_quantisation_that_cannot_be_undone_is_refused_by_name(
    make: Callable[[State], State],
    parts: list[str],
    plain: State,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    torch.save(make(plain), tmp_path / "d.pt")
    with pytest.raises(BadWeights) as caught:
        quietly(tmp_path / "b", wan=checkpoint.base, draft=tmp_path / "d.pt")
    message = str(caught.value)
    assert [part for part in [*parts, "do this: "] if part not in message] == [], message
