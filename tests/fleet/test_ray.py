# SPDX-License-Identifier: Apache-2.0
"""On a real cluster of three nodes on this machine, one of which dies."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.fleet.cluster import RayCluster, WorkerLost, _RayWorker, connected, nodes
from pw_runtime.fleet.layout import lay_out
from pw_runtime.fleet.messages import Made
from pw_runtime.types import RunOptions
from tests.e2e.pw import Pw, write_preset

pytestmark = pytest.mark.slow
PROMPTS = ("a cat", "a dog", "a red ball", "grass", "the sea")


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that computes nothing, and two nodes with room for a worker each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=1)
    yield found
    found.shutdown()


def arguments(bundle: Path, preset: Path, out: Path) -> list[object]:
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    return [
        "--model", bundle, "--preset", preset, "--out", out, "--codec", "ffv1",
        "--conv", "onednn", "--policy", "eager", *prompts,
    ]  # fmt: skip


@pytest.fixture
def node_dies_with_the_first_clip(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the node of one of the two workers when one has made a clip.

    Until its death is known no worker is asked for more: the others cannot have made everything.
    """
    lost, dying, call = threading.Event(), threading.Lock(), _RayWorker.call

    def watched(worker: _RayWorker, method: str, *args: Any) -> Any:
        try:
            found = call(worker, method, *args)
            if method == "events" and any(isinstance(event, Made) for event in found):
                if dying.acquire(blocking=False):
                    node = cluster.list_all_nodes()[-1]
                    cluster.remove_node(node, allow_graceful=False)
                end = time.monotonic() + 60
                while not lost.wait(0.02) and time.monotonic() < end:
                    call(worker, "versions")
        except WorkerLost:
            lost.set()
            raise
        return found

    monkeypatch.setattr(_RayWorker, "call", watched)


@pytest.mark.usefixtures("node_dies_with_the_first_clip")
def test_a_node_dies_and_every_clip_is_there_with_the_bytes_of_one_run(
    pw: Pw, cluster: Any, bundle_dir: Path, tmp_path: Path
) -> None:
    preset, out = write_preset(tmp_path / "small.toml"), tmp_path / "fleet"
    assert pw("generate", *arguments(bundle_dir, preset, tmp_path / "alone")).code == 0
    words = arguments(bundle_dir, preset, out)
    ended = pw("fleet", "run", "--address", cluster.address, *words)
    assert ended.code == 0, ended.err
    assert "is lost: " in ended.err
    names = sorted(f"{i}.mkv" for i in range(len(PROMPTS)))
    assert sorted(Path(line).name for line in ended.out.splitlines()) == names
    assert sorted(path.name for path in out.iterdir()) == sorted(
        names + [f"{i}.json" for i in range(len(PROMPTS))]
    )
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_errors_and_deaths_of_workers_cross_the_cluster(
    cluster: Any, bundle_dir: Path, tmp_path: Path
) -> None:
    with connected(cluster.address):
        fleet = RayCluster(lay_out(nodes(), None, None, 1))
        worker = fleet.start("w0-abc")
        assert worker.call("versions")["pixelwizard-runtime"]
        options, digest = RunOptions(device="cpu", conv="onednn"), "f" * 64
        with pytest.raises(BadRequest, match="is another one than the driver's"):
            worker.call("join", str(bundle_dir), digest, options, str(tmp_path), "")
        with pytest.raises(WorkerLost, match="no batch"):
            worker.call("read", "0.mp4", 0)
        worker.stop()
        with pytest.raises(WorkerLost):
            worker.call("versions")


def test_an_address_where_nobody_listens_is_one_error(pw: Pw, bundle_dir: Path) -> None:
    ended = pw(
        "fleet", "run", "--address", "ray://127.0.0.1:1", "--model", bundle_dir,
        "--preset", "nano", "--prompt", "a cat", "--out", "out",
    )  # fmt: skip
    assert ended.code == 2
    assert "no Ray cluster answers at ray://127.0.0.1:1" in ended.err
