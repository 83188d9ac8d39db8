# SPDX-License-Identifier: Apache-2.0
"""Other people's attention as implementations of the operation, as far as a CPU can tell."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pw_kernels import attention, op
from pw_kernels.attention import reference
from pw_kernels.attention.libraries import LIBRARIES, available
from tests.kernels.accuracy import assert_as_accurate, normal


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(n, 2, 64, dtype=torch.bfloat16, seed=n) for n in (37, 70, 70))
    return q, k, v + 1


def choose(monkeypatch: pytest.MonkeyPatch, implementation: op.Implementation) -> None:
    choice = op.Choice(implementation, "a test")
    module = sys.modules["pw_kernels.attention"]  # the name in pw_kernels is the function
    monkeypatch.setattr(module, "chosen", lambda *_: choice)


def test_flash_is_attention(monkeypatch: pytest.MonkeyPatch, inputs) -> None:
    """PyTorch has a flash attention for CPUs too."""
    oracle = reference(*(x.double() for x in inputs))
    choose(monkeypatch, "flash")
    assert_as_accurate(attention(*inputs), reference(*inputs), oracle)


def test_flash_attn_is_called_with_tokens_before_heads(
    monkeypatch: pytest.MonkeyPatch, inputs
) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert [x.shape for x in (q, k, v)] == [(1, 37, 2, 64), (1, 70, 2, 64), (1, 70, 2, 64)]
        return reference(q[0], k[0], v[0])[None]

    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    choose(monkeypatch, "flash-attn")
    assert torch.equal(attention(*inputs), reference(*inputs))


@pytest.mark.parametrize("name", LIBRARIES)
def test_bias_and_log_sum_exp_run_the_reference(
    monkeypatch: pytest.MonkeyPatch, inputs, name: op.Implementation
) -> None:
    choose(monkeypatch, name)
    bias = normal(70, dtype=torch.bfloat16)
    assert torch.equal(attention(*inputs, bias), reference(*inputs, bias))
    out, lse = attention(*inputs, return_lse=True)
    wanted, wanted_lse = reference(*inputs, return_lse=True)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_a_refusal_names_the_input(monkeypatch: pytest.MonkeyPatch, inputs) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have cuDNN")
    choose(monkeypatch, "cudnn")
    with pytest.raises(RuntimeError, match=r"CUDNN_ATTENTION refused q \(37, 2, 64\) torch.bf"):
        attention(*inputs)


def test_flash_attn_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, inputs) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    choose(monkeypatch, "flash-attn")
    with pytest.raises(RuntimeError, match="pip install flash-attn"):
        attention(*inputs)
    assert available("cudnn")


def test_implementations_are_chosen_by_operation() -> None:
    gpu = torch.device("cuda")
    with op.using("triton", attention="cudnn"):
        assert op.chosen("attention", gpu).implementation == "cudnn"
        assert op.chosen("norm_modulate", gpu).implementation == "triton"
        assert op.chosen("merge_attention", gpu).implementation == "reference"
    with op.using("reference", attention="gluon"):
        assert op.chosen("attention", gpu).implementation == "gluon"
        assert op.chosen("norm_modulate", gpu).implementation == "reference"
    assert op.chosen("attention", gpu).implementation == "reference"


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="no operation convolve"), op.using("triton", convolve="x"):
        pass
    with (
        pytest.raises(
            ValueError, match=r"pw::norm_modulate wants one of reference, triton, got cu"
        ),
        op.using("triton", norm_modulate="cudnn"),
    ):
        pass
