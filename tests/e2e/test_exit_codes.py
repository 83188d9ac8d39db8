# SPDX-License-Identifier: Apache-2.0
"""One kind of error has one exit code, whatever the verb."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pw_bench.results import write_result
from pw_runtime.system import atomic_files
from tests.bench.small_results import figure
from tests.bench.small_results import result as small_result
from tests.e2e.pw import Pw
from tests.oracle.checkpoint import Checkpoint

VERBS = {
    "generate": ("generate", "--prompt", "a cat", "--draft-only", "--out", "{new}"),
    "generate --contact-sheet": (
        "generate", "--prompt", "a cat", "--draft-only", "--contact-sheet", "--out", "{new}"
    ),
    "generate --trace": (
        "generate", "--prompt", "a cat", "--draft-only", "--trace", "{new}", "--out", "{out}",
        "--overwrite",
    ),
    "decode": ("decode", "{out}/0.latents.safetensors", "--out", "{new}"),
    "convert": ("convert", "--wan", "{checkpoint}", "--out", "{new}"),
    "build --onnx-only": ("build", "--onnx-only", "{new}"),
    "compare --json": ("compare", "{out}", "{out}", "--json", "{new}"),
    "compare --contact-sheet": ("compare", "{out}", "{out}", "--contact-sheet", "{new}"),
    "bench report": ("bench", "report", "{result}", "--out", "{new}"),
    "bench kernels": (
        "bench", "kernels", "--quick", "--only", "norm_modulate", "--sizes", "tiny", "--out",
        "{new}",
    ),
}  # fmt: skip
WITH_MODEL = ("generate", "decode", "build")
WITH_PRESET = ("generate",)


@pytest.mark.slow
@pytest.mark.parametrize("title", VERBS)
def test_a_refused_write_is_exit_code_3_in_every_verb(
    title: str,
    pw: Pw,
    bundle_dir: Path,
    checkpoint: Checkpoint,
    preset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = VERBS[title]
    model = ("--model", bundle_dir) if words[0] in WITH_MODEL else ()
    sizes = ("--preset", preset) if words[0] in WITH_PRESET else ()
    out, result = tmp_path / "out", tmp_path / "result.json"
    if words[0] in ("decode", "compare"):
        made = pw(
            "generate", "--prompt", "a cat", "--draft-only", "--save-latents", "--out", out,
            "--model", bundle_dir, "--preset", preset,
        )  # fmt: skip
        assert made.code == 0, made.err
    write_result(small_result(figure("clip", 1.0)), result)
    places = {
        "new": tmp_path / "new", "out": out, "checkpoint": checkpoint.base, "result": result,
    }  # fmt: skip

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(atomic_files, "_sync", full)
    ended = pw(*(word.format(**places) for word in words), *model, *sizes)
    assert ended.code == 3, ended.err
    assert "No space left on device" in ended.err
    assert "Traceback" not in ended.err
