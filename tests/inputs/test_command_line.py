# SPDX-License-Identifier: Apache-2.0
"""Bad inputs through the real command line: exit code 2, one error, nothing that drives a terminal,
and nothing computed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pw_runtime.system.printable import printable
from tests.e2e.pw import Pw, write_preset
from tests.inputs.small_files import small_latents

EVIL = "\x1b[2J\x9b31m\u202e"


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Inputs of every kind, by the names that the cases use."""
    os.mkfifo(tmp_path / "pipe")
    write_preset(tmp_path / "ok.toml")
    small_latents(tmp_path / "0.latents.safetensors")
    (tmp_path / "evil.jsonl").write_text(json.dumps({"id": EVIL, "text": "x"}))
    (tmp_path / "raw.jsonl").write_text('{"id": "' + EVIL)
    (tmp_path / "case.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "A", "text": "x"}')
    (tmp_path / "digits.jsonl").write_text('{"id": ' + "9" * 5000 + ', "text": "x"}')
    (tmp_path / "null.jsonl").write_text('{"id": null, "text": "x"}')
    (tmp_path / "keys.toml").write_text("\n".join(f"a{i} = 1" for i in range(20_000)))
    (tmp_path / "deep.toml").write_text(".".join("a" * 5000) + " = 1")
    (tmp_path / "evil.toml").write_text('["\\u001b[2J\\u202e"]\n')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "link").symlink_to("/dev/full")
    return tmp_path


GENERATE = "generate --model {bundle} --out {out} "
CASES = {
    "--preset {f}/ok.toml --prompts {f}/pipe": "a named pipe",
    "--preset {f}/ok.toml --prompts /dev/zero": "a device",
    "--preset {f}/ok.toml --prompts {f}/evil.jsonl": "cannot name a file",
    "--preset {f}/ok.toml --prompts {f}/raw.jsonl": "is not JSON",
    "--preset {f}/ok.toml --prompts {f}/case.jsonl": "by case",
    "--preset {f}/ok.toml --prompts /no" + EVIL: "No such file",
    "--preset {f}/ok.toml --prompt x --noise {f}/pipe": "a named pipe",
    "--preset {f}/ok.toml --prompt x --trace {f}/pipe": "a named pipe",
    "--preset {f}/ok.toml --prompt x --trace /dev/full": "a device",
    "--preset {f}/ok.toml --prompt x --trace {f}/link": "a device",
    "--preset {f}/pipe.toml --prompt x": "No such file",
    "--preset {f}/keys.toml --prompt x": "more than 64 KiB",
    "--preset {f}/deep.toml --prompt x": "line 1 has",
    "--preset {f}/evil.toml --prompt x": "is not a preset",
    "--preset {f}/ok.toml --prompt x --trace {f}/gone/t.json": "create the folder",
    "--preset {f}/ok.toml --prompt x --gpu-memory " + "9" * 400: "invalid size",
    "--preset {f}/ok.toml --prompt x --host-memory " + "9" * 400 + "GiB": "invalid size",
    "--preset {f}/ok.toml --prompt x --chunk 99999999": "is not in the range",
    "--preset {f}/ok.toml --prompt x --negative \udcff": "the negative prompt is not text",
    "--preset {f}/ok.toml --prompt x --negative " + "x" * 100_001: "negative prompt is too long",
    "--preset {f}/ok.toml --prompt x --spill-dir {f}/ok.toml": "no folder, but a file",
    "--preset {f}/ok.toml --prompts {f}/digits.jsonl": "an integer of more than 4300 digits",
    "--preset {f}/ok.toml --prompts {f}/null.jsonl": "got: null",
    "--preset {f}/ok.toml --prompt x --seed " + "9" * 400: "seed is too large",
    "--preset {f}/ok.toml --prompt x --" + EVIL: "No such option",
}
COMMANDS = {GENERATE + rest: says for rest, says in CASES.items()} | {
    "decode {f}/pipe --model {bundle} --out {out}": "a named pipe",
    "decode {f}/0.latents.safetensors --model {bundle} --out {out}": "made for another VAE",
    "decode {f}/0.latents.safetensors --model {f} --out {out}": "there is no bundle",
    "finish 0 --drafts {f} --model {bundle} --frames 0": "--frames changes a preset",
    "build --model {bundle} --frames 0": "--frames changes a preset",
    "plan --model {bundle} --preset {f}/ok.toml --device": "No such option",
    "plan --preset 2k --codec png": "one frame",
    "plan --preset 2k --size 16384x16384 --codec av1": "av1",
    "plan --preset 2k --devices 2x24GiB --guidance-reuse 1": "several ranks",
    "plan --preset 2k --linear int8 --set compat.bf16_einsum=true": "official rounding",
    "plan --preset 2k --draft-only --lora-highres {f}/ok.toml": "this run has none",
    "bench compare {f}/pipe {f}/pipe": "a named pipe",
    "bench compare {f}/deep.json {f}/deep.json": "nested more than",
    "compare {f}/pipe {f}/pipe": "a named pipe",
}


@pytest.mark.parametrize(
    ("command", "says"),
    COMMANDS.items(),
)
def test_a_bad_input_is_one_error(
    pw: Pw, folder: Path, bundle_dir: Path, command: str, says: str
) -> None:
    words = command.split(" ")
    out = folder / "out"
    ended = pw(*(word.format(f=folder, bundle=bundle_dir, out=out) for word in words if word))
    assert ended.code == 2, ended.err
    assert says in ended.err
    assert printable(ended.err) == ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err) < 1500
    assert not list(out.glob("*.mp4"))
