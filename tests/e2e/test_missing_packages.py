# SPDX-License-Identifier: Apache-2.0
"""Every verb where a package is missing: it works, or one error says what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from pw_bench.results import write_result
from pw_runtime.system.packages import BASE, declared, module_of
from tests.bench.small_results import figure
from tests.bench.small_results import result as small_result
from tests.oracle.checkpoint import Checkpoint

RUN = """
import contextlib, io, json, sys

for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # an import of it fails, as where it is not installed
verbs, ended = json.loads(sys.argv[2]), {}
from pw_runtime.cli.main import main

for title, arguments in verbs.items():
    sys.argv = ["pw", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        ended[title] = (end.code, out.getvalue(), err.getvalue())
    except BaseException as error:
        ended[title] = (1, "", f"Traceback {type(error).__name__}: {error}")
print(json.dumps(ended))
"""


@dataclass(frozen=True)
class Ended:
    """How a verb ended."""

    code: int
    out: str
    err: str


def run_verbs(missing: list[str], verbs: Mapping[str, list[str]]) -> dict[str, Ended]:
    """Run verbs one after the other in one process that cannot import some modules."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(missing), json.dumps(verbs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {title: Ended(*end) for title, end in json.loads(run.stdout.splitlines()[-1]).items()}


@pytest.fixture
def verbs(
    bundle_dir: Path, checkpoint: Checkpoint, preset: Path, tmp_path: Path
) -> dict[str, list[str]]:
    """Commands of every verb, which work where nothing is missing."""
    model = ["--model", str(bundle_dir)]
    result = tmp_path / "result.json"
    write_result(small_result(figure("clip", 1.0, 1.1, 1.2, 1.1, 1.0)), result)
    out = tmp_path / "out"
    return {
        "--version": ["--version"],
        "--help": ["--help"],
        "doctor": ["doctor"],
        "plan": ["plan", *model, "--preset", str(preset), "--host-memory", "8GiB"],
        "engines list": ["engines", "list"],
        "engines prune": ["engines", "prune"],
        "build": ["build", *model, "--dry-run", "--device", "cpu"],
        "build --onnx-only": ["build", *model, "--onnx-only", str(tmp_path / "onnx")],
        "convert": ["convert", "--wan", str(checkpoint.base), "--out", str(tmp_path / "made")],
        "generate": [
            "generate", *model, "--preset", str(preset), "--out", str(out), "--prompt", "a cat",
            "--save-latents", "--contact-sheet",
        ],
        "decode": [
            "decode", *model, str(out / "0.latents.safetensors"), "--out", str(tmp_path / "again")
        ],
        "compare": ["compare", str(out / "0.mp4"), str(tmp_path / "again" / "0.mp4")],
        "bench compare": ["bench", "compare", str(result), str(result)],
        "bench report": ["bench", "report", str(result), "--out", str(tmp_path / "page.html")],
        "bench e2e": [
            "bench", "e2e", "--preset", "nano", "--out", str(tmp_path / "e2e.json"),
            "--side", "official",
        ],
        "bench quality": ["bench", "quality", *model, "--out", str(tmp_path / "quality.json")],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("package", declared()[BASE])
def test_without_a_base_package_every_verb_works_or_names_it(
    package: str, verbs: dict[str, list[str]]
) -> None:
    for title in ("build --onnx-only", "bench e2e", "bench quality"):
        del verbs[title]  # slow where they work, and refused by the next test where they do not
    ended = run_verbs([module_of(package)], verbs)
    assert ended["doctor"].code == 0
    assert f"not ready: {package} is broken" in ended["doctor"].out
    named = set()
    for title, end in ended.items():
        assert "Traceback" not in end.err, f"{title}: {end.err}"
        assert end.code in (0, 2), f"{title}: {end.code} {end.err}"
        if f"pip install '{package}" in end.err:
            named.add(title)
            assert end.code == 2
            error = end.err[end.err.index("error:") :]  # torch warns of a missing numpy before it
            assert len(error.splitlines()) <= 4, f"{title}: {end.err}"
    assert "generate" in named
    assert named >= ({"plan", "build", "convert"} if package == "torch" else set())


@pytest.mark.slow
def test_a_plain_install_has_every_verb_but_those_that_name_what_they_need(
    verbs: dict[str, list[str]],
) -> None:
    extras = {name for group, names in declared().items() if group != BASE for name in names}
    shared = {"jinja2"}  # torch needs it, so a plain install has it
    missing = sorted(extras - declared()[BASE].keys() - shared - {"build"})
    ended = run_verbs([module_of(name) for name in missing], verbs)
    refused = {title: end for title, end in ended.items() if end.code != 0}
    assert {title: end.code for title, end in refused.items()} == dict.fromkeys(
        ("build --onnx-only", "compare", "bench compare", "bench e2e", "bench quality"), 2
    )
    installs = {
        "build --onnx-only": "pip install 'onnx>=1.18' 'onnxscript>=0.5'",
        "compare": "pip install 'scikit-image>=0.24' 'scipy>=1.11'",
        "bench compare": "pip install 'scipy>=1.11'",
        "bench e2e": "transformers is not installed: pip install 'transformers",
        "bench quality": "pip install 'scikit-image>=0.24' 'scipy>=1.11'",
    }
    for title, end in refused.items():
        assert installs[title] in end.err
        assert "Traceback" not in end.err


def test_the_entry_point_needs_nothing_but_the_standard_library() -> None:
    """-S leaves out site-packages: a Python with nothing installed."""
    root = Path(__file__).parents[2]
    for arguments, code in ((["generate"], 2), (["doctor"], 0)):
        run = subprocess.run(
            [sys.executable, "-S", "-m", "pw_runtime", *arguments],
            cwd=root,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert run.returncode == code, run.stderr
        assert "Traceback" not in run.stderr
    assert "not ready: torch is missing" in run.stdout
