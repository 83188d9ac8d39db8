# SPDX-License-Identifier: Apache-2.0
"""A spec lets through what its engine can take, and says what is wrong with the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pw_engines.spec import DTYPES, EngineSpec, TensorSpec, digest_of, dtype_name
from tests.engines.small import LIMIT, key, spec, tensors


@pytest.mark.parametrize("tokens", [2, 17, LIMIT])
def test_sizes_are_those_of_the_call(tokens: int) -> None:
    inputs, outputs = tensors(tokens)
    assert spec().sizes(inputs) == {"tokens": tokens}
    spec().check_outputs(outputs, {"tokens": tokens})


@pytest.mark.parametrize(
    ("index", "x", "message"),
    [
        (0, torch.zeros(4, 8, dtype=torch.float64), "x: expected fp32, got torch.float64"),
        (0, torch.zeros(4), r"x: expected shape \('tokens', 8\), got \(4,\)"),
        (0, torch.zeros(4, 9), r"x: expected 8 of 8, got \(4, 9\)"),
        (0, torch.zeros(1, 8), "x: expected tokens from 2 to 40, got 1"),
        (0, torch.zeros(41, 8), "x: expected tokens from 2 to 40, got 41"),
        (1, torch.zeros(8, 7), r"weight: expected 8 of 8, got \(8, 7\)"),
    ],
)
def test_inputs_of_another_kind_are_named(index: int, x: Tensor, message: str) -> None:
    inputs, _ = tensors(4)
    inputs[index] = x
    with pytest.raises(ValueError, match=f"mix, tensor {message}"):
        spec().sizes(inputs)


@pytest.mark.parametrize(
    ("index", "x", "message"),
    [
        (0, torch.zeros(4, 8, dtype=torch.float16), "y: expected fp32, got torch.float16"),
        (0, torch.zeros(5, 8), r"y: expected shape \(4, 8\), got \(5, 8\)"),
        (1, torch.zeros(4, 1), r"mean: expected shape \(4,\), got \(4, 1\)"),
    ],
)
def test_outputs_of_another_kind_are_named(index: int, x: Tensor, message: str) -> None:
    _, outputs = tensors(4)
    outputs[index] = x
    with pytest.raises(ValueError, match=f"mix, tensor {message}"):
        spec().check_outputs(outputs, {"tokens": 4})


def test_numbers_of_tensors_are_checked() -> None:
    inputs, outputs = tensors(4)
    with pytest.raises(ValueError, match="mix takes 2 tensors, got 1"):
        spec().sizes(inputs[:1])
    with pytest.raises(ValueError, match="mix returns 2 tensors, got 3 to fill"):
        spec().check_outputs([*outputs, outputs[0]], {"tokens": 4})


def test_one_name_has_one_size() -> None:
    both = tuple(TensorSpec(name=name, dtype="fp32", shape=("tokens", 8)) for name in "ab")
    with pytest.raises(ValueError, match=r"tensor b: expected tokens of 4, got \(5, 8\)"):
        spec(inputs=both).sizes([torch.zeros(4, 8), torch.zeros(5, 8)])


def test_every_named_dimension_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="mix has no limit for tokens"):
        spec(limits=())


def test_a_segment_is_no_path() -> None:
    with pytest.raises(ValueError, match=r"name, got the path '\.\./mix'"):
        spec(segment="../mix")


def test_dtypes_have_one_name_each() -> None:
    assert {dtype_name(dtype): dtype for dtype in DTYPES.values()} == dict(DTYPES)
    with pytest.raises(ValueError, match=r"engines take fp32, .*, got torch\.float64"):
        dtype_name(torch.float64)


CHANGES: dict[str, dict[str, Any]] = {
    "segment": {"spec": spec(segment="other")},
    "dtype": {"spec": spec(inputs=(TensorSpec(name="x", dtype="bf16", shape=("tokens", 8)),))},
    "shape": {"spec": spec(inputs=(TensorSpec(name="x", dtype="fp32", shape=("tokens", 9)),))},
    "name": {"spec": spec(inputs=(TensorSpec(name="z", dtype="fp32", shape=("tokens", 8)),))},
    "outputs": {"spec": spec(outputs=spec().outputs[:1])},
    "limit": {"spec": spec(limits=(("tokens", 41),))},
    "sources": {"spec": spec(sources="1")},
    "numbers": {"spec": spec(numbers=(("eps", 1e-3),))},
    "weights": {"spec": spec(weights="abc")},
    "backend": {"backend": "tensorrt"},
    "platform": {"platform": (("torch", "2.13.1"),)},
    "options": {"options": (("level", "3"),)},
}


def test_keys_differ_in_every_field() -> None:
    folders = {name: key(**changes).folder for name, changes in CHANGES.items()}
    assert len({*folders.values(), key().folder}) == len(folders) + 1
    assert key().folder == key().folder
    assert folders["backend"].startswith("mix-tensorrt-")


def test_every_field_of_spec_and_key_is_tried() -> None:
    tried = {"inputs", "outputs", "segment", "limits", "sources", "numbers", "weights"}
    assert set(EngineSpec.__dataclass_fields__) == tried
    assert set(type(key()).__dataclass_fields__) == {"spec", "backend", "platform", "options"}


def test_digest_lists_where_texts_end() -> None:
    assert digest_of([b"ab", b"c"]) != digest_of([b"a", b"bc"])
    assert digest_of([b"ab"]) != digest_of([b"ab", b""])
    assert digest_of(iter([b"a"])) == digest_of([b"a"])
