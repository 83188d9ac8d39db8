# SPDX-License-Identifier: Apache-2.0
"""Models by name, from the local cache of Hugging Face's hub, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pw_runtime.checkpoint.lora_choice import parse_lora
from pw_runtime.errors import BadRequest
from pw_runtime.system.hub_cache import find_model, hub_cache, in_hub_cache
from tests.e2e.pw import Pw
from tests.oracle.checkpoint import Checkpoint

COMMIT = "921dbaf3f1674a56f47e83fb80a34bac8a8f203e"


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path, name: str, source: Path) -> Path:
    """Lay a folder down as `hf download` does: links into a folder of blobs."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for number, file in enumerate(x for x in sorted(source.rglob("*")) if x.is_file()):
        link, blob = snapshot / file.relative_to(source), repository / "blobs" / f"{number:064x}"
        for folder in (link.parent, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def some_files(folder: Path) -> Path:
    (folder / "2k").mkdir(parents=True)
    (folder / "2k" / "model.pt").write_bytes(b"weights")
    return folder


def test_a_name_a_file_of_it_and_its_folder_in_the_cache_are_found(
    hub: Path, tmp_path: Path
) -> None:
    snapshot = publish(hub, "wxli318/PixelWizard", some_files(tmp_path / "files"))
    assert find_model("wxli318/PixelWizard") == snapshot
    assert find_model("wxli318/PixelWizard/2k/model.pt") == snapshot / "2k" / "model.pt"
    assert find_model(str(hub / "models--wxli318--PixelWizard")) == snapshot
    assert in_hub_cache(snapshot / "2k")
    assert not in_hub_cache(tmp_path / "files")


def test_a_path_that_exists_is_that_path(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(hub, "models/mine", some_files(tmp_path / "files"))
    some_files(tmp_path / "models" / "mine")
    assert find_model("models/mine") == Path("models/mine")
    assert find_model("models/slip") == Path("models/slip"), "whoever opens it names the fault"
    assert find_model("2k/model.pt") == Path("2k/model.pt")
    assert find_model("/no/such/place") == Path("/no/such/place")
    assert find_model("../up/there") == Path("../up/there")


@pytest.mark.parametrize("function", [find_model, lambda name: parse_lora(name).path])
def test_a_path_that_cannot_be_looked_up_is_left_to_whoever_opens_it(
    function: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert function("x" * 300) == Path("x" * 300)

    def forbidden(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", forbidden)
    assert function(f"{tmp_path}/closed/x.safetensors") == tmp_path / "closed/x.safetensors"


def test_the_error_has_the_command_that_downloads(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as error:
        find_model("Wan-AI/Wan2.2-TI2V-5B")
    assert "run `hf download Wan-AI/Wan2.2-TI2V-5B` first" in str(error.value)
    assert f"no models--Wan-AI--Wan2.2-TI2V-5B in {hub}" in str(error.value)
    publish(hub, "wxli318/PixelWizard", some_files(tmp_path / "files"))
    with pytest.raises(BadRequest, match=r"run `hf download wxli318/PixelWizard 4k/model\.pt`"):
        find_model("wxli318/PixelWizard/4k/model.pt")


def test_an_incomplete_download_is_named(hub: Path, tmp_path: Path) -> None:
    snapshot = publish(hub, "a/b", some_files(tmp_path / "files"))
    next((hub / "models--a--b" / "blobs").iterdir()).unlink()
    with pytest.raises(BadRequest, match=r"incomplete in the cache\n.*without 2k/model\.pt"):
        find_model("a/b")
    (hub / "models--a--b" / "refs" / "main").write_text("../../../etc")
    with pytest.raises(BadRequest, match="incomplete"):
        find_model("a/b")  # the only snapshot, whatever the reference says
    (snapshot.parent / ("0" * 40)).mkdir()
    with pytest.raises(BadRequest, match=r"without a branch main\n.*is no commit; 2 snapshots"):
        find_model("a/b")


def test_the_cache_is_where_the_hub_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_cache() == Path.home() / ".cache" / "huggingface" / "hub"
    expected = {
        "XDG_CACHE_HOME": ("/x", "/x/huggingface/hub"),
        "HF_HOME": ("/h", "/h/hub"),
        "HUGGINGFACE_HUB_CACHE": ("/old", "/old"),
        "HF_HUB_CACHE": ("~/hub", str(Path.home() / "hub")),
    }
    for name, (value, folder) in expected.items():
        monkeypatch.setenv(name, value)
        assert hub_cache() == Path(folder)


def test_a_clip_is_made_from_a_bundle_or_a_checkpoint_by_name(
    pw: Pw, hub: Path, bundle_dir: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    publish(hub, "me/bundle", bundle_dir)
    base = publish(hub, "Wan-AI/Wan2.2-TI2V-5B", checkpoint.base)
    high = tmp_path / "high"
    (high / "2k").mkdir(parents=True)
    shutil.copy(checkpoint.highres, high / "2k" / "model.pt")
    publish(hub, "wxli318/PixelWizard", high)
    common = (
        "--prompt", "a cat", "--preset", "nano", "--set", "draft.steps=1",
        "--set", "highres.steps=1", "--set", "video.frames=1",
    )  # fmt: skip
    ended = pw("generate", "--model", "me/bundle", *common, "--out", tmp_path / "a")
    assert ended.code == 0, ended.err
    models = ("--model", "Wan-AI/Wan2.2-TI2V-5B", "--hr_ckpt", "wxli318/PixelWizard/2k/model.pt")
    ended = pw("generate", *models, *common, "--out", tmp_path / "b")
    assert ended.code == 0, ended.err
    assert f"converting {base} once" in ended.err
    assert (tmp_path / "a" / "0.png").read_bytes() == (tmp_path / "b" / "0.png").read_bytes()
    ended = pw("generate", *models, *common, "--out", tmp_path / "c")
    assert ended.code == 0, ended.err
    assert "converted from" in ended.err, "not converted again"
    ended = pw("plan", "--model", "me/missing", "--preset", "2k")
    assert ended.code == 2
    assert "hf download me/missing" in ended.err


def test_no_library_of_the_hub_is_imported() -> None:
    code = "import sys, pw_runtime.system.hub_cache as x; x.find_model('/a'); print(*sys.modules)"
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"huggingface_hub", "requests", "httpx", "torch"} & set(run.stdout.split())
