# SPDX-License-Identifier: Apache-2.0
"""An output folder that already contains something: nothing finished is lost, replaced or mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pw_runtime import pipeline
from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.job import clip as clip_module
from pw_runtime.job import networks as networks_module
from pw_runtime.system.folder_lock import NAME, locked_folder
from tests.e2e.children import run_child
from tests.e2e.pw import Ended, Pw

LATENTS = "0.latents.safetensors"
Generate = Callable[..., Ended]


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Generate:
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--codec", "ffv1", *arguments,
        )  # fmt: skip

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_another_prompt_does_not_replace_a_finished_clip(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate("--prompt", "a red ball").code == 0
    before = content(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(networks_module, "load_text_network", lambda *_: pytest.fail("computed"))
        ended = generate("--prompt", "a blue ball")
    assert ended.code == 2
    assert "contains files of an earlier run" in ended.err
    assert '0.mkv: prompt.text is "a red ball", wanted "a blue ball"' in ended.err
    assert "--overwrite replaces them" in ended.err
    assert content(tmp_path / "out") == before


def test_overwrite_replaces(generate: Generate, tmp_path: Path) -> None:
    assert generate("--prompt", "a red ball").code == 0
    assert generate("--prompt", "a blue ball", "--overwrite").code == 0
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["prompt"]["text"] == "a blue ball"


def test_latents_kept_on_purpose_are_not_deleted(generate: Generate, tmp_path: Path) -> None:
    assert generate("--prompt", "a cat", "--save-latents").code == 0
    (tmp_path / "out" / "0.mkv").unlink()
    (tmp_path / "out" / "0.json").unlink()
    before = content(tmp_path / "out")
    ended = generate("--prompt", "a dog")
    assert ended.code == 2
    assert f"{LATENTS}: prompt.text is" in ended.err
    assert f"pw decode {tmp_path / 'out' / LATENTS}" in ended.err
    assert content(tmp_path / "out") == before
    assert generate("--prompt", "a cat").code == 0
    assert (tmp_path / "out" / LATENTS).read_bytes() == before[LATENTS]


def test_the_same_command_computes_what_is_missing(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate("--prompt", "a cat").code == 0
    before = (tmp_path / "out" / "0.mkv").stat()
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(tmp_path / "out" / name) for name in ("0.mkv", "1.mkv")]
    assert "prompt 0: skipped" in ended.err
    assert "draft 0" not in ended.err
    after = (tmp_path / "out" / "0.mkv").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    with monkeypatch.context() as patch:  # nothing is left to compute, and nothing is loaded
        patch.setattr(networks_module, "load_text_network", lambda *_: pytest.fail("computed"))
        ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 0, ended.err


def test_fresh_makes_a_finished_clip_again_and_replaces_no_other(
    generate: Generate, tmp_path: Path
) -> None:
    assert generate("--prompt", "a cat").code == 0
    video = tmp_path / "out" / "0.mkv"
    before = video.read_bytes(), video.stat().st_ino
    assert generate("--prompt", "a dog", "--fresh").code == 2
    assert generate("--prompt", "a cat", "--fresh").code == 0
    assert video.read_bytes() == before[0]
    assert video.stat().st_ino != before[1]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--prompt", "a dog"), 'prompt.text is "a cat", wanted "a dog"'),
        (("--prompt", "a cat", "--seed", 7), "seeds.base is 0, wanted 7"),
        (("--prompt", "a cat", "--negative", "blur"), 'wanted "blur"'),
        (
            ("--prompt", "a cat", "--vae-precision", "bf16"),
            'options.vae_precision is "fp32", wanted "bf16"',
        ),
    ],
)
def test_another_clip_is_refused_with_both_values(
    generate: Generate, tmp_path: Path, arguments: tuple[object, ...], field: str
) -> None:
    assert generate("--prompt", "a cat").code == 0
    before = content(tmp_path / "out")
    ended = generate(*arguments)
    assert ended.code == 2
    assert field in ended.err
    assert content(tmp_path / "out") == before


def test_a_clip_that_was_decoded_in_another_way_is_the_clip_of_that_way(
    pw: Pw, generate: Generate, bundle_dir: Path, tmp_path: Path
) -> None:
    assert generate("--prompt", "a cat", "--save-latents").code == 0
    for name in ("0.mkv", "0.json"):
        (tmp_path / "out" / name).unlink()
    other = ("--vae-precision", "bf16", "--conv", "onednn")
    assert pw("decode", tmp_path / "out" / LATENTS, "--model", bundle_dir, *other).code == 0
    ended = generate("--prompt", "a cat")
    assert ended.code == 2
    assert 'options.vae_precision is "bf16", wanted "fp32"' in ended.err
    ended = generate("--prompt", "a cat", *other)
    assert ended.code == 0
    assert "prompt 0: skipped" in ended.err


def test_a_truncated_clip_is_refused_and_made_again_on_request(
    generate: Generate, tmp_path: Path
) -> None:
    assert generate("--prompt", "a cat").code == 0
    video = tmp_path / "out" / "0.mkv"
    whole = video.read_bytes()
    video.write_bytes(whole[:-1])
    ended = generate("--prompt", "a cat")
    assert ended.code == 2
    assert f"0.mkv: {len(whole) - 1} bytes, and its receipt says {len(whole)}" in ended.err
    assert generate("--prompt", "a cat", "--fresh").code == 0
    assert video.read_bytes() == whole


def test_an_earlier_contact_sheet_is_not_replaced(generate: Generate, tmp_path: Path) -> None:
    assert generate("--prompt", "a cat", "--contact-sheet").code == 0
    (tmp_path / "prompts.jsonl").write_text('{"id": "other", "text": "a dog"}')
    ended = generate("--prompts", tmp_path / "prompts.jsonl", "--contact-sheet")
    assert ended.code == 2
    assert "contact_sheet.png" in ended.err


@pytest.mark.parametrize("other", ["0.mp4", "nothing.mp4"])
def test_a_clip_in_another_container_is_not_left_without_its_receipt(
    generate: Generate, tmp_path: Path, other: str
) -> None:
    assert generate("--prompt", "a cat", "--codec", "h264", "--save-latents").code == 0
    if other != "0.mp4":  # what a link names counts as little as what a file contains
        (tmp_path / "out" / "0.mp4").unlink()
        (tmp_path / "out" / "0.mp4").symlink_to(other)
    before = content(tmp_path / "out") if other == "0.mp4" else {}
    ended = generate("--prompt", "a dog", "--overwrite")
    assert ended.code == 2
    assert "0.mp4 would stay beside 0.mkv, described by no receipt" in ended.err
    assert "remove 0.mp4" in ended.err
    assert not before or content(tmp_path / "out") == before


def test_a_link_to_nothing_at_the_place_of_a_clip_is_refused_at_once(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks_module, "load_text_network", lambda *_: pytest.fail("computed"))
    (tmp_path / "out").mkdir()
    for name in ("0.mkv", "0.json", LATENTS):
        for target, says in (("gone/x", "whose folder does not exist"), ("x", "earlier run")):
            (tmp_path / "out" / name).symlink_to(target)
            ended = generate("--prompt", "a cat")
            assert (ended.code, says in ended.err) == (2, True), ended.err
            (tmp_path / "out" / name).unlink()


HOLD = """
from pathlib import Path
from types import SimpleNamespace
from pw_runtime.system.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds the lock of tmp_path/out."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys" + HOLD, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_into_one_folder_is_refused_until_the_first_has_died(
    generate: Generate, held: subprocess.Popen[str], tmp_path: Path
) -> None:
    ended = generate("--prompt", "a cat")
    assert ended.code == 2
    assert "another run is writing into" in ended.err
    assert f"process {held.pid} on " in ended.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    held.kill()
    held.communicate()
    assert generate("--prompt", "a cat").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.json", "0.mkv"]


def test_a_lock_is_exclusive_and_leaves_nothing(tmp_path: Path) -> None:
    refused = pytest.raises(BadRequest, match="another run")
    with locked_folder(tmp_path), refused, locked_folder(tmp_path):
        pytest.fail("locked twice")
    assert list(tmp_path.iterdir()) == []


TERMINATED = """
for name in ("SIGTERM", "SIGHUP"):  # ignored where the tests run in the background
    signal.signal(getattr(signal, name), signal.SIG_DFL)
decode_frames = pipeline.decode_frames
def ended(*arguments, **options):
    yield next(decode_frames(*arguments, **options))
    os.kill(os.getpid(), getattr(signal, os.environ["PW_TEST_SIGNAL"]))
    time.sleep(60)
pipeline.decode_frames = ended
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_asks_to_end_leaves_no_partial_file(
    bundle_dir: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PW_TEST_SIGNAL", name)
    out = tmp_path / "out"
    run = run_child(
        TERMINATED, "generate", "--model", bundle_dir, "--preset", preset, "--out", out,
        "--codec", "ffv1", "--prompt", "a cat",
    )  # fmt: skip
    assert run.returncode == 128 + signal.Signals[name], run.stderr
    assert f"ended by {name}" in run.stderr
    assert "to finish this clip, run: pw decode" in run.stderr
    assert [path.name for path in out.iterdir()] == [LATENTS]


KILLED_IN_SECOND_DRAFT = """
denoise_draft, calls = pipeline.denoise_draft, []
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return denoise_draft(*arguments, **options)
pipeline.denoise_draft = killed
cli.main()
"""


@pytest.mark.slow
def test_a_draft_is_on_the_disk_as_soon_as_it_is_made(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = run_child(
        KILLED_IN_SECOND_DRAFT, "generate", "--model", bundle_dir, "--preset", preset,
        "--out", out, "--prompt", "a cat", "--prompt", "a dog",
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL
    tensors = load_file(out / LATENTS)
    assert {"draft_noise", "draft_latent", "text_context"} <= tensors.keys()
    assert torch.isfinite(tensors["draft_latent"]).all()


@pytest.fixture
def refusing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk of tmp_path/out refuse latents."""
    write = clip_module.write_latents

    def refused(path: Path, *arguments: object) -> None:
        if path.parent == tmp_path / "out":
            raise WriteFailed(f"cannot write {path}", got="No space left on device")
        write(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(clip_module, "write_latents", refused)


@pytest.mark.usefixtures("refusing_out")
def test_after_a_refused_write_no_further_clip_is_computed(
    generate: Generate, tmp_path: Path
) -> None:
    ended = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 3
    assert "prompt 1 failed: not computed: the latents of 0 could not be written" in ended.err
    assert "draft 1" not in ended.err
    assert (tmp_path / "out" / "0.mkv").exists()  # decoded from memory


@pytest.mark.usefixtures("refusing_out")
def test_refused_latents_go_to_the_spill_folder(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spill").mkdir()

    def full(*arguments: object) -> None:
        raise WriteFailed("cannot write the video", got="No space left on device")

    monkeypatch.setattr(pipeline, "decode_clip", full)
    ended = generate("--prompt", "a cat", "--prompt", "a dog", "--spill-dir", tmp_path / "spill")
    assert ended.code == 3
    assert ended.err.count("to finish this clip, run: pw decode") == 2
    names = sorted(path.name for path in (tmp_path / "spill").iterdir())
    assert names == [LATENTS, "1.latents.safetensors"]
    assert "highres_latent" in load_file(tmp_path / "spill" / LATENTS)


def test_a_disk_without_room_for_the_latents_is_refused_at_once(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(networks_module, "load_text_network", lambda *_: pytest.fail("computed"))
    ended = generate("--prompt", "a cat")
    assert ended.code == 3
    assert "not enough room in" in ended.err
