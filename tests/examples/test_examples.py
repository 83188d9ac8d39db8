# SPDX-License-Identifier: Apache-2.0
"""Every example runs as it stands, with the built-in model and fewer steps."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import av
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from pw_runtime.presets import find_preset
from tests.e2e.pw import write_preset
from tests.inputs.videos import shades, write_video

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESET = EXAMPLES / "custom_preset.toml"
PROMPT = "a big red ball drifts to the right over a meadow"
SIZE = (9, 256, 128)


def run(name: str, *arguments: object) -> None:
    """Run an example's program in this process."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


def size_of(video: Path) -> tuple[int, int, int]:
    """Return frames, width and height of a video."""
    with av.open(video) as container:
        frames = list(container.decode(video=0))
    return len(frames), frames[0].width, frames[0].height


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def notebook() -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / "first_clip.ipynb", as_version=4)


def test_every_example_is_described_and_tested() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    described = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text("utf-8")))
    assert described == names
    tests = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in names if f'"{name}"' not in tests} == set()


@pytest.mark.slow
def test_generate_writes_a_clip_and_its_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    run("generate.py", PROMPT, "--preset", PRESET)
    assert size_of(Path("clips/generate.mp4")) == SIZE
    receipt = json.loads(Path("clips/generate.json").read_text(encoding="utf-8"))
    assert receipt["prompt"]["text"] == PROMPT
    assert "clips/generate.mp4, and its receipt" in capsys.readouterr().out


@pytest.mark.slow
def test_a_clip_begins_with_the_picture() -> None:
    Image.new("RGB", (300, 150), (40, 90, 200)).save("picture.png")
    run("image_to_video.py", "picture.png", PROMPT, "--preset", PRESET)
    assert size_of(Path("clips/from_picture.mp4")) == SIZE
    receipt = json.loads(Path("clips/from_picture.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(Path("picture.png").read_bytes()).hexdigest()
    assert receipt["sources"]["image"]["sha256"] == digest


@pytest.mark.slow
def test_many_drafts_end_with_a_contact_sheet_and_the_chosen_one_is_finished(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (PROMPT, "--preset", PRESET, "--count", 2)
    run("many_drafts.py", *arguments)
    assert Path("clips/drafts/contact_sheet.png").exists()
    run("many_drafts.py", *arguments, "--finish", 1)
    assert size_of(Path("clips/1.mp4")) == SIZE
    assert not Path("clips/0.mp4").exists()
    with pytest.raises(SystemExit):
        run("many_drafts.py", *arguments, "--finish", 1, 2)
    assert "no draft 2: they are 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_server_is_asked_followed_and_ended(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run("serve_and_call.py", PROMPT, "--preset", PRESET, "--port", port)
    assert size_of(Path("clips/served.mp4")) == SIZE
    said = capfd.readouterr().out
    assert "completed  100 %" in said
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_engines_are_built_and_run(bundle_dir: Path, tmp_path: Path) -> None:
    """With the tests' small model, by the backend that is quicker to build on a CPU."""
    pytest.importorskip("openvino", reason="AOTInductor's engines take minutes")
    programs = Path(sys.executable).parent
    if not (programs / "pw").exists():
        pytest.skip("needs the installed program, as `make` installs it")
    preset = write_preset(tmp_path / "small.toml")
    ended = subprocess.run(
        ["bash", EXAMPLES / "build_engines.sh", bundle_dir, preset, "out", "--backend", "openvino"],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    receipt = json.loads(Path("out/0.json").read_text(encoding="utf-8"))
    assert receipt["engines"]["draft"]["backend"] == "openvino"
    assert receipt["engines"]["highres"]["backend"] == "openvino"


def test_clips_side_by_side_are_one_animated_picture() -> None:
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        write_video(Path(name), shades(5, 64, 32))
    run("preview.py", "a.mkv", "b.mkv", "c.mkv", "--columns", 2, "--out", "all.webp")
    with Image.open("all.webp") as picture:
        assert (picture.size, picture.n_frames, picture.info["loop"]) == ((128, 64), 5, 0)
        shown = [picture.convert("RGB").getpixel((100, 10))[0] for _ in map(picture.seek, range(5))]
    assert shown == sorted(shown)
    assert shown[0] < 20 < shown[-1]


def test_clips_of_different_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_video(Path("a.mkv"), shades(2, 64, 32))
    write_video(Path("b.mkv"), shades(2, 32, 32))
    with pytest.raises(SystemExit, match="2"):
        run("preview.py", "a.mkv", "b.mkv")
    assert "must have one size, and have 2: [(32, 32), (64, 32)]" in capsys.readouterr().err


def test_the_preset_is_one_of_the_built_in_models() -> None:
    preset = find_preset(str(EXAMPLES / "custom_preset.toml"))
    nano = find_preset("nano")
    assert preset.highres is not None
    assert nano.highres is not None
    assert (preset.draft.width, preset.highres.width) == (nano.draft.width, nano.highres.width)
    assert preset.draft.guidance == nano.draft.guidance


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """All of "first_clip.ipynb", with the preset of fewer steps."""
    made = notebook()
    made.cells[1].source = made.cells[1].source.replace('"nano"', repr(str(PRESET)))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(made, timeout=300, kernel_name="python3", resources=place).execute()
    shown = {
        kind
        for cell in made.cells
        for out in cell.get("outputs", ())
        for kind in out.get("data", ())
    }
    assert {"image/png", "text/html"} <= shown
    assert size_of(tmp_path / "clips" / "notebook.mp4") == SIZE
