# SPDX-License-Identifier: Apache-2.0
"""Third-party attention as implementations of the operation, as far as a CPU can tell."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pw_kernels import attention, op
from pw_kernels.attention import attention_with_lse, reference, reference_with_lse
from pw_kernels.attention.libraries import LIBRARIES, available
from tests.kernels.accuracy import assert_as_accurate, normal


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(n, 2, 64, dtype=torch.bfloat16, seed=n) for n in (37, 70, 70))
    return q, k, v + 1


def test_flash_is_attention(inputs) -> None:
    """PyTorch has a flash attention for CPUs too."""
    oracle = reference(*(x.double() for x in inputs))
    with op.using("reference", attention="flash"), op.ignore_device():
        assert_as_accurate(attention(*inputs), reference(*inputs), oracle)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand in for the function of either package: tokens before heads, a leading batch."""
    assert [x.shape for x in (q, k, v)] == [(1, 37, 2, 64), (1, 70, 2, 64), (1, 70, 2, 64)]
    return reference(q[0], k[0], v[0])[None]


def test_flash_attn_is_called_with_tokens_before_heads(
    monkeypatch: pytest.MonkeyPatch, inputs
) -> None:
    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with op.using("reference", attention="flash-attn"), op.ignore_device():
        assert torch.equal(attention(*inputs), reference(*inputs))


def test_flash_attn_4_is_called_in_its_own_module(monkeypatch: pytest.MonkeyPatch, inputs) -> None:
    """It returns a pair; the second is the log-sum-exp, None unless requested."""
    package = SimpleNamespace(flash_attn_func=lambda *qkv: (flash_attn_func(*qkv), None))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    with op.using("reference", attention="flash-attn-4"), op.ignore_device():
        assert torch.equal(attention(*inputs), reference(*inputs))
        wide = (torch.cat((x, x, x), dim=2) for x in inputs)
        with pytest.raises(ValueError, match="expects head width 64 or 128 for flash-attn-4"):
            attention(*wide)
        with pytest.raises(ValueError, match="expects bf16 or fp16 for flash-attn-4"):
            attention(*(x.float() for x in inputs))


@pytest.mark.parametrize("name", LIBRARIES)
def test_bias_and_log_sum_exp_run_the_reference(inputs, name: op.Implementation) -> None:
    bias = normal(70, dtype=torch.bfloat16)
    with op.using("reference", attention=name), op.ignore_device():
        assert torch.equal(attention(*inputs, bias), reference(*inputs, bias))
        out, lse = attention_with_lse(*inputs)
    expected, expected_lse = reference_with_lse(*inputs)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_a_refusal_names_the_input(inputs) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have cuDNN")
    with (
        op.using("reference", attention="cudnn"),
        op.ignore_device(),
        pytest.raises(
            RuntimeError, match=r"CUDNN_ATTENTION does not take q \(37, 2, 64\) torch.bf"
        ),
    ):
        attention(*inputs)


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4"])
def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, inputs, name: op.Implementation
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with (
        op.using("reference", attention=name),
        op.ignore_device(),
        pytest.raises(RuntimeError, match=f"as {name} expects flash_attn.*pip install {name},"),
    ):
        attention(*inputs)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that is searched for packages, first."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def install(packages: Path, module: str, distribution: str) -> None:
    """Install a package as pip would leave it, its function missing."""
    folder = packages.joinpath(*module.split("."))
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    metadata = packages / f"{distribution.replace('-', '_')}-9.0.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.0\n")


def test_flash_attn_4_is_not_flash_attn(packages: Path, inputs) -> None:
    """Seen: flash-attn-4 installs flash_attn/cute alone, and flash-attn then counted as there."""
    install(packages, "flash_attn.cute", "flash-attn-4")
    assert available("flash-attn-4")
    assert not available("flash-attn")
    with (
        op.using("reference", attention="flash-attn"),
        op.ignore_device(),
        pytest.raises(RuntimeError, match=r"installed: flash-attn-4 9.0\): pip install flash-"),
    ):
        attention(*inputs)


def test_flash_attn_is_not_flash_attn_4(packages: Path) -> None:
    install(packages, "flash_attn", "flash-attn")
    assert available("flash-attn")
    assert not available("flash-attn-4")


def test_what_pytorch_brings_is_always_available() -> None:
    assert available("cudnn")
    assert available("flash")


def test_implementations_are_selected_by_operation() -> None:
    gpu = torch.device("cuda")
    with op.using("triton", attention="cudnn"):
        assert op.select("attention", gpu) == "cudnn"
        assert op.select("norm_modulate", gpu) == "triton"
        assert op.select("merge_attention", gpu) == "reference"
    with op.using("reference", attention="gluon"):
        assert op.select("attention", gpu) == "gluon"
        assert op.select("norm_modulate", gpu) == "reference"
    assert op.select("attention", gpu) == "reference"


def test_unknown_choices_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="unknown operation convolve, expected one of "),
        op.using("triton", convolve="x"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="unknown operation convolve, expected one of "),
        op.using("triton", convolve="x"),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=r"pw::norm_modulate expects one of reference, triton, got cu"
        ),
        op.using("triton", norm_modulate="cudnn"),
    ):
        pass
