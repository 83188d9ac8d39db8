# SPDX-License-Identifier: Apache-2.0
"""`auto` is settled before anything is computed: references on a CPU, what is fastest on a GPU."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from pw_kernels.attention.trials import NO_TIME, Trial
from pw_kernels.op import select
from pw_runtime.cli.doctor import _measured
from pw_runtime.cli.generate import generate
from pw_runtime.errors import BadRequest
from pw_runtime.job import kernel_choice
from pw_runtime.job.checks import check_request
from pw_runtime.job.conv_choice import computing_as
from pw_runtime.job.kernel_choice import Measured, facts, measured_attention, settle_kernels
from pw_runtime.presets import PRESETS
from pw_runtime.types import Compat, DitConfig, Prompt, Request, RunOptions

CONFIG = DitConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64)
TRIALS = (
    Trial(implementation="reference", seconds=2.0, error=1e-3),
    Trial(implementation="cudnn", seconds=1.0, error=1e-3),
)
MEASURED = Measured(
    made_of={"gpu": "one"}, tokens=4, heads=2, width=128, trials=TRIALS, choice="cudnn"
)


def request(tmp_path: Path, **options: object) -> Request:
    named = RunOptions(**{"device": "cuda", "precision": "bf16", **options})  # type: ignore[arg-type]
    made = Request(
        prompts=(Prompt("a cat"),), preset=PRESETS["2k"], out=tmp_path, options=named.resolved()
    )
    check_request(made)
    return made


def options_of(
    made: Request,
    *,
    say: Callable[[str], None] = print,
    config: DitConfig = CONFIG,
) -> tuple[RunOptions, list[int]]:
    """Return the settled options, and the sizes at which attention was measured."""
    with patch.object(kernel_choice, "measured_attention", return_value=MEASURED) as measured:
        options = settle_kernels(made, {"draft": CONFIG, "highres": config}, say)
    return options, [call.args[1] for call in measured.call_args_list]


def settled(made: Request, *, say: Callable[[str], None] = print) -> object:
    options, tokens = options_of(made, say=say)
    return options.kernels, options.attention, tokens


TWO_K = 31 * 45 * 80


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("triton", "cudnn", [TWO_K])),
        ({"kernels": "triton"}, ("triton", "triton", [])),
        ({"kernels": "reference"}, ("reference", "reference", [])),
        ({"kernels": "reference", "attention": "auto"}, ("reference", "cudnn", [TWO_K])),
        ({"attention": "gluon"}, ("triton", "gluon", [])),
        ({"precision": "fp32"}, ("triton", "reference", [])),
        ({"draft_only": True}, ("triton", "cudnn", [TWO_K])),  # as the run that goes on from it
        ({"device": "cpu", "precision": None}, ("reference", "reference", [])),
    ],
)
def test_what_runs_is_settled_by_device_precision_and_measurement(
    options: dict[str, object], expected: object, tmp_path: Path
) -> None:
    assert settled(request(tmp_path, **options)) == expected


def test_engines_of_whole_blocks_leave_nothing_to_choose(tmp_path: Path) -> None:
    made = request(tmp_path)
    whole = replace(made, options=replace(made.options, blocks="attention"))
    assert settled(whole) == ("reference", "reference", [])


def test_the_official_rounding_keeps_the_reference_and_that_is_said(tmp_path: Path) -> None:
    quirky = replace(PRESETS["2k"], compat=Compat(bf16_einsum=True))
    said: list[str] = []
    made = replace(request(tmp_path), preset=quirky)
    assert settled(made, say=said.append) == ("reference", "cudnn", [TWO_K])
    assert any("compat.bf16_einsum" in line for line in said)


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({}, "triton"),
        ({"precision": "fp32"}, "reference"),
        ({"precision": "fp32", "kernels": "triton", "attention": "reference"}, "reference"),
        ({"kernels": "reference"}, "reference"),
        ({"kernels": "reference", "attention": "gluon"}, "triton"),
    ],
)
def test_sparse_attention_runs_its_kernel_only_in_a_precision_that_it_takes(
    options: dict[str, object], runs: str, tmp_path: Path
) -> None:
    """Seen: in fp32 the high-res stage ended at the kernel's check, with the draft computed."""
    chosen, _ = options_of(request(tmp_path, sparse_attention=0.5, **options))
    with computing_as(chosen):
        assert select("sparse_attention", torch.device("cuda")) == runs


def test_sparse_attention_of_heads_without_a_kernel_is_the_reference_or_refused_at_once(
    tmp_path: Path,
) -> None:
    narrow, said = replace(CONFIG, num_heads=8), list[str]()
    made = request(tmp_path, sparse_attention=0.5)
    chosen, _ = options_of(made, say=said.append, config=narrow)
    assert chosen.kernels == "reference"
    assert "64 or 128, and those of the high-res network have 32" in said[0]
    named = request(tmp_path, sparse_attention=0.5, kernels="triton", attention="cudnn")
    with pytest.raises(BadRequest, match=r"(?s)cannot run --sparse-attention.*have 32"):
        options_of(named, config=narrow)


def test_a_measurement_is_kept_for_the_next_run_and_repeated_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    cpu = torch.device("cpu")
    with patch.object(kernel_choice, "measure", return_value=TRIALS) as measuring:
        first = measured_attention(cpu, 64, CONFIG, said.append)
        assert measured_attention(cpu, 64, CONFIG, said.append) == first
        assert measuring.call_count == 1
        measured_attention(cpu, 128, CONFIG, said.append)
        assert measuring.call_count == 2
        measured_attention(cpu, 64, CONFIG, said.append, again=True)
        assert measuring.call_count == 3
        for file in (tmp_path / "cache" / "kernels").iterdir():
            file.write_text("{")
        assert measured_attention(cpu, 64, CONFIG, said.append) == first
    assert measuring.call_count == 4
    assert len(said) == 4
    assert first.choice == "cudnn"


def test_a_measurement_that_ran_out_of_time_is_for_one_process_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "_of_this_process", {})
    cut, said = Trial(implementation="flash", refused=NO_TIME), list[str]()
    with patch.object(kernel_choice, "measure", side_effect=[(*TRIALS, cut), TRIALS]) as measuring:
        first = measured_attention(torch.device("cpu"), 64, CONFIG, said.append)
        assert first.choice == "cudnn"
        assert said[-1] == "this measurement is not kept: no time was left for flash"
        assert measured_attention(torch.device("cpu"), 64, CONFIG, said.append) == first
        assert measuring.call_count == 1
        monkeypatch.setattr(kernel_choice, "_of_this_process", {})  # as in another process
        measured_attention(torch.device("cpu"), 64, CONFIG, said.append)
        measured_attention(torch.device("cpu"), 64, CONFIG, said.append)
    assert measuring.call_count == 2


def test_a_measurement_is_for_one_version_of_all_that_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimpleNamespace(name="GPU 1", major=9, minor=0, multi_processor_count=132)
    versions = {"triton": "3.7.1", "flash-attn": "2.8.3", "flash-attn-4": "4.0.0"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(kernel_choice, "candidates", lambda device: ("reference", "triton"))
    monkeypatch.setattr(kernel_choice, "library", lambda: None)
    monkeypatch.setattr(kernel_choice, "driver_version", lambda: "580.1")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    seen = [facts(torch.device("cuda"))]
    for package in versions:
        versions[package] += ".post1"
        seen.append(facts(torch.device("cuda")))
    monkeypatch.setattr(kernel_choice, "driver_version", lambda: "590.1")
    seen.append(facts(torch.device("cuda")))
    for driver in ("525", "580"):  # that compiled libraries need
        compiled = SimpleNamespace(manifest={"toolchains": {"90": {"driver": driver}}})
        monkeypatch.setattr(kernel_choice, "library", lambda found=compiled: found)
        seen.append(facts(torch.device("cuda")))
    assert all(later not in seen[:number] for number, later in enumerate(seen))


def test_the_doctor_names_the_attention_of_the_gpus_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path))
    with (
        patch.object(kernel_choice, "measure", return_value=TRIALS),
        patch.object(kernel_choice, "facts", return_value={"gpu": "GPU 1"}),
    ):
        measured_attention(torch.device("cpu"), TWO_K, CONFIG, print)
    (tmp_path / "kernels" / "attention-damaged.json").write_text("{")
    lines = ["cudnn at 111,600 tokens on GPU 1, as measured"]
    assert list(_measured({"GPU 1", "GPU 2"})) == lines
    assert list(_measured({"GPU 2"})) == []


def test_the_command_line_has_the_defaults_of_the_python_interface() -> None:
    """Seen: --conv was None by default, which every GPU refused."""
    given = generate.make_context("pw", ["--preset", "draft", "--out", "x"]).params
    defaults = {field.name: field.default for field in fields(RunOptions)}
    assert given.pop("codec") is None  # as the length has it: h264, or png for one frame
    assert {name: given.get(name, default) for name, default in defaults.items()} == defaults
