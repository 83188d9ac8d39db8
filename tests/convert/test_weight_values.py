# SPDX-License-Identifier: Apache-2.0
"""Weights that are no numbers are counted and refused by name; odd ones are warned of."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import pytest
import torch

import pw_export.convert
from pw_export.convert import convert
from pw_runtime.errors import BadWeights
from tests.convert.layouts import T5, VAE, State, official_state, pixelwizard_state, quietly
from tests.oracle.checkpoint import Checkpoint

NAME = "blocks.1.ffn.0.weight"


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> State:
    """Load a draft network with clean names."""
    return official_state(checkpoint.base)["draft"]


def saved(path: Path, state: State, values: list[float], dtype: torch.dtype) -> Path:
    """Write a draft whose first values of one weight are these."""
    weight = state[NAME].to(dtype).clone()
    weight.view(-1)[: len(values)] = torch.tensor(values, dtype=torch.float64).to(dtype)
    torch.save({**state, NAME: weight}, path)
    return path


@pytest.mark.parametrize(
    ("values", "dtype", "count"),
    [
        ([nan], torch.float32, "1 NaN"),
        ([nan] * 3, torch.bfloat16, "3 NaN"),
        ([inf, -inf], torch.float16, "2 infinite"),
        ([nan, inf, 1.0], torch.float64, "1 NaN, 1 infinite"),
        ([3.4e38, -3.4e38], torch.float32, "2 too large for bf16"),
        ([1e300, nan, -inf], torch.float64, "1 NaN, 1 infinite, 1 too large for bf16"),
    ],
)
def test_weights_that_are_no_numbers_are_counted_and_refused(
    values: list[float],
    dtype: torch.dtype,
    count: str,
    plain: State,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    draft = saved(tmp_path / "d.pt", plain, values, dtype)
    with pytest.raises(BadWeights, match=r"d\.pt has weights that are not numbers") as caught:
        quietly(tmp_path / "b", wan=checkpoint.base, draft=draft)
    assert f"got: {NAME} ({count} of 19,968)" in str(caught.value)
    assert "do this: " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["d.pt"]


def test_all_tensors_that_are_no_numbers_are_named_whichever_shard_they_are_in(
    plain: State, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pw_export.convert, "SHARD_BYTES", 100_000)
    torch.save({name: tensor * nan for name, tensor in plain.items()}, tmp_path / "d.pt")
    with pytest.raises(BadWeights) as caught:
        quietly(tmp_path / "b", wan=checkpoint.base, draft=tmp_path / "d.pt")
    assert f"in {len(plain)} tensor(s)" in str(caught.value)
    assert f"({len(plain)} in all)" in str(caught.value)


@pytest.mark.parametrize("name", [VAE, T5])
def test_every_network_is_looked_at(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    wan = tmp_path / "wan"
    wan.mkdir()
    for file in checkpoint.base.iterdir():
        (wan / file.name).symlink_to(file)
    state = torch.load(wan / name, weights_only=True)
    (wan / name).unlink()
    first = next(iter(state))
    torch.save({**state, first: state[first] * nan}, wan / name)
    with pytest.raises(BadWeights, match=f"{name} has weights that are not numbers"):
        quietly(tmp_path / "b", wan=wan)


def test_the_highres_network_is_looked_at(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = pixelwizard_state(checkpoint.highres)
    torch.save({"generator": {**state, NAME: state[NAME] * inf}}, tmp_path / "h.pt")
    with pytest.raises(BadWeights, match=r"h\.pt has weights that are not numbers"):
        quietly(tmp_path / "b", wan=checkpoint.base, highres=tmp_path / "h.pt")


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ([1e5], f"beyond 65,504, the largest fp16 number, beyond any weight that is known: {NAME}"),
        ([0.0] * 19_968, f"1 tensor(s) are all zeros: {NAME}"),
        ([65504.0, 1e-40], ""),
    ],
)
def test_values_that_no_published_weight_has_are_warned_of(
    values: list[float], warning: str, plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    draft = saved(tmp_path / "d.pt", plain, values, torch.float32)
    lines: list[str] = []
    convert(wan=checkpoint.base, draft=draft, out=tmp_path / "b", say=lines.append)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == bool(warning)
    assert all(warning in line and "d.pt" in line for line in warnings)
