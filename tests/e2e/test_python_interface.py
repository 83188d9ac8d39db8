# SPDX-License-Identifier: Apache-2.0
"""The Python interface has the defaults and the checks of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pw_runtime import Prompt, Reporter, Request, RunOptions, find_preset, generate, open_bundle
from pw_runtime.errors import BadRequest


def request_for(tmp_path: Path, *prompts: Prompt, **changes: object) -> Request:
    return Request(
        prompts=prompts or (Prompt("a cat"),),
        preset=find_preset("nano"),
        out=str(tmp_path / "out"),  # type: ignore[arg-type]
        options=RunOptions(**changes),  # type: ignore[arg-type]
    )


def test_device_and_precision_are_picked_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = request_for(tmp_path).options
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (options.torch_device.type, options.compute_precision) == ("cpu", "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (options.torch_device.type, options.compute_precision) == ("cuda", "bf16")
    assert RunOptions(device="cpu", precision="bf16").compute_precision == "bf16"


def test_paths_may_be_text(tmp_path: Path, bundle_dir: Path) -> None:
    assert request_for(tmp_path).out == tmp_path / "out"
    assert open_bundle(str(bundle_dir)).root == bundle_dir


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((Prompt("a cat"), Prompt("a dog")), "two prompts have the id '0'"),
        ((Prompt("a cat", id="../x"),), "cannot name a file"),
        ((Prompt("a cat", id="A"), Prompt("a dog", id="a", position=2)), "differ by case"),
        ((Prompt("a cat", position=0),), "the position of prompt '0' is below 1"),
    ],
)
def test_prompts_are_checked_however_they_were_made(
    tmp_path: Path, bundle_dir: Path, prompts: tuple[Prompt, ...], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        generate(request_for(tmp_path, *prompts), open_bundle(bundle_dir), Reporter(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_unknown_is_one_error(tmp_path: Path, bundle_dir: Path) -> None:
    with pytest.raises(BadRequest, match="unknown device"):
        generate(request_for(tmp_path, device="tpu!"), open_bundle(bundle_dir), Reporter())
