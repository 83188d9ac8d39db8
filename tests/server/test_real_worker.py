# SPDX-License-Identifier: Apache-2.0
"""`pw serve` as a user starts it, with a model and clips that are computed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.pipeline import generate
from pw_runtime.presets import find_preset
from pw_runtime.server.messages import Join, order_line
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Prompt, Request, RunOptions
from tests.e2e.pw import write_preset
from tests.server.servers import Served, running, wait_until_ready

pytestmark = pytest.mark.slow
PROMPT = "a fox runs through snow"


def command(bundle: Path, folder: Path, root: Path) -> list[str]:
    """`pw serve` with presets that have the same draft, but for `long`, and a slow stage."""
    presets = [
        write_preset(folder / "small.toml"),
        write_preset(folder / "five.toml", highres_steps=5),
        write_preset(folder / "long.toml", draft_steps=900),
        write_preset(folder / "deep.toml", highres_steps=400),
    ]
    options = [word for preset in presets for word in ("--preset", str(preset))]
    model = ["--model", str(bundle), "--device", "cpu"]
    place = ["--root", str(root), "--port", "0"]
    return [sys.executable, "-m", "pw_runtime", "serve", *model, *options, *place]


@pytest.fixture(scope="module")
def served(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with running(command(bundle_dir, folder, folder / "root"), OMP_NUM_THREADS="1") as made:
        wait_until_ready(made)
        yield made


def pictures(content: bytes) -> np.ndarray:
    """Decode a video: [frames, height, width, 3]."""
    with av.open(BytesIO(content)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_a_draft_that_is_finished_has_the_bits_of_one_run(
    served: Served, bundle_dir: Path, tmp_path: Path
) -> None:
    draft = served.until_ended(served.create(PROMPT, seed=5, preset="five", draft_only=True)["id"])
    assert draft["status"] == "completed", draft["error"]
    finished = served.http.post(
        "/v1/videos", json={"draft_id": draft["id"], "preset": "small"}
    ).json()
    assert served.until_ended(finished["id"])["status"] == "completed"
    at_once = served.until_ended(served.create(PROMPT, seed=5, preset="small")["id"])
    assert at_once["status"] == "completed", at_once["error"]
    request = Request(
        prompts=(Prompt(PROMPT),),
        preset=find_preset(str(write_preset(tmp_path / "small.toml"))),
        out=tmp_path / "clips",
        seed=5,
        options=RunOptions(device="cpu"),
    )
    (outcome,) = generate(request, open_bundle(bundle_dir), Reporter(quiet=True))
    assert outcome.video is not None
    expected = pictures(outcome.video.read_bytes())
    for video in (finished, at_once):
        content = served.http.get(f"/v1/videos/{video['id']}/content").content
        assert np.array_equal(pictures(content), expected)
    receipt = served.http.get(f"/v1/videos/{finished['id']}/receipt").json()
    assert receipt["prompt"]["text"] == PROMPT
    assert "highres" in receipt["seconds"]
    assert not {"text", "draft"} & set(receipt["seconds"]), "the draft was not made again"
    picture = served.http.get(f"/v1/videos/{finished['id']}/content?variant=thumbnail")
    assert picture.content[:2] == b"\xff\xd8"


def test_a_clip_from_a_picture_has_the_bits_of_one_run(
    served: Served, bundle_dir: Path, tmp_path: Path
) -> None:
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((120, 80)).save(tmp_path / "start.png")
    content = (tmp_path / "start.png").read_bytes()
    draft = served.http.post(
        "/v1/videos",
        data={"prompt": PROMPT, "seed": "5", "preset": "small", "draft_only": "true"},
        files={"input_reference": ("start.png", content, "image/png")},
    ).json()
    ended = served.until_ended(draft["id"])
    assert ended["status"] == "completed", ended["error"]
    finished = served.http.post("/v1/videos", json={"draft_id": draft["id"]}).json()
    ended = served.until_ended(finished["id"])
    assert ended["status"] == "completed", ended["error"]
    request = Request(
        prompts=(Prompt(PROMPT, image=tmp_path / "start.png"),),
        preset=find_preset(str(write_preset(tmp_path / "small.toml"))),
        out=tmp_path / "clips",
        seed=5,
        options=RunOptions(device="cpu"),
    )
    (outcome,) = generate(request, open_bundle(bundle_dir), Reporter(quiet=True))
    assert outcome.video is not None
    made = served.http.get(f"/v1/videos/{finished['id']}/content").content
    assert np.array_equal(pictures(made), pictures(outcome.video.read_bytes()))
    receipt = served.http.get(f"/v1/videos/{finished['id']}/receipt").json()
    assert receipt["sources"]["image"]["sha256"] == finished["picture"]
    assert not {"text", "encode", "draft"} & set(receipt["seconds"])


def test_a_running_job_ends_within_a_block_and_the_worker_stays(served: Served) -> None:
    worker = served.worker()
    video = served.create(PROMPT, preset="long")
    running_now = served.until(video["id"], lambda v: v["seconds_left"] is not None)
    assert (running_now["stage"], running_now["steps"]) == ("draft", 900)
    ended = served.http.post(f"/v1/videos/{video['id']}/cancel").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
    assert served.until_ended(served.create(PROMPT)["id"])["status"] == "completed"
    assert served.worker() == worker


def test_a_signal_to_all_processes_of_a_service_leaves_a_worker_to_the_server(
    served: Served,
) -> None:
    """systemd sends SIGTERM to the whole control group: the step in hand was lost."""
    worker = served.worker()
    video = served.create(PROMPT, preset="long")
    served.until(video["id"], lambda v: v["seconds_left"] is not None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.kill(worker, number)
    ended = served.http.post(f"/v1/videos/{video['id']}/cancel").json()
    assert ended["error"]["code"] == "cancelled"
    assert served.until_ended(served.create(PROMPT)["id"])["status"] == "completed"
    assert served.worker() == worker


def test_after_a_kill_of_its_worker_a_job_goes_on_in_the_midst_of_a_stage(served: Served) -> None:
    video = served.create(PROMPT, preset="deep")
    before = served.until(video["id"], lambda v: v["stage"] == "highres" and v["step"] > 40)
    os.kill(served.worker(), signal.SIGKILL)
    served.until(video["id"], lambda v: v["stage"] != "highres")
    after = served.until(video["id"], lambda v: v["stage"] == "highres" and v["step"] > 0)
    served.http.post(f"/v1/videos/{video['id']}/cancel")
    assert after["step"] > before["step"] - 5


def test_a_kill_of_the_server_in_the_midst_of_a_job_costs_no_job(
    bundle_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    start = command(bundle_dir, tmp_path, root)
    with running(start, OMP_NUM_THREADS="1") as served:
        wait_until_ready(served)
        video = served.create(PROMPT, seed=2, preset="small")
        served.until(video["id"], lambda v: v["status"] == "in_progress")
        served.process.kill()
        served.process.wait()
    with running(start, OMP_NUM_THREADS="1") as served:
        assert served.until_ended(video["id"])["status"] == "completed"
        assert served.end() == 128 + signal.SIGTERM


def test_a_folder_without_a_model_is_refused_at_once(tmp_path: Path) -> None:
    start = command(tmp_path / "absent", tmp_path, tmp_path / "root")
    ended = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "is not a bundle" in ended.stderr


def test_options_that_no_job_could_be_made_with_are_refused_at_the_start(
    bundle_dir: Path, tmp_path: Path
) -> None:
    start = [*command(bundle_dir, tmp_path, tmp_path / "root"), "--guidance-reuse", "99"]
    ended = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "--guidance-reuse" in ended.stderr


def test_two_presets_of_one_name_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_preset(tmp_path / "other" / "small.toml")
    start = [*command(bundle_dir, tmp_path, tmp_path / "root"), "--preset", str(other)]
    ended = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "two presets have the name small" in ended.stderr


def test_an_address_for_others_is_refused_without_a_token(bundle_dir: Path, tmp_path: Path) -> None:
    start = [*command(bundle_dir, tmp_path, tmp_path / "root"), "--host", "0.0.0.0"]
    ended = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "no token is set" in ended.stderr


def test_the_process_that_answers_imports_no_torch() -> None:
    code = (
        "import sys, pw_runtime.server.serve; "
        "print({'torch', 'numpy', 'av', 'safetensors', 'pw_engines'} & set(sys.modules))"
    )
    path = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == "set()"


def test_a_worker_without_its_model_ends_in_order_while_it_is_listened_to(tmp_path: Path) -> None:
    """Seen: "Fatal Python error" at the exit, because a thread was reading stdin."""
    path = os.pathsep.join(filter(None, sys.path))
    worker = subprocess.Popen(
        [sys.executable, "-m", "pw_runtime.server.worker", str(os.getpid())],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    options = RunOptions(device="cpu")
    join = Join(
        model=str(tmp_path / "gone"), presets={"nano": find_preset("nano")}, options=options
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    with worker.stdin:  # open until it has ended
        worker.stdin.write(order_line(join))
        worker.stdin.flush()
        assert worker.wait(120) == 2
    assert b"there is no bundle" in worker.stdout.read()
    assert worker.stderr.read() == b""
