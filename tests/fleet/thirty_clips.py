# SPDX-License-Identifier: Apache-2.0
"""Thirty clips on a cluster of three nodes, one of which is killed twice: a check run by hand.

    python -m tests.fleet.thirty_clips --model BUNDLE [--preset nano] [--processes-per-worker 2]

It takes minutes. The clips must be those of one `pw generate` over the same prompts, byte for byte.
Where a worker has several processes, one of them is killed in place of the first node.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CLIPS = 30
KILL_AT = (5, 15)  # finished clips at which a node is killed, in the middle of its batch
SHAPES = ("red ball", "blue cube", "green triangle")
COMMAND = [sys.executable, "-m", "pw_runtime"]


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a bundle")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--processes-per-worker", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"A big {SHAPES[i % 3]} drifts to the right over grass." for i in range(CLIPS)]
        (folder / "prompts.txt").write_text("\n".join(lines))
        words = ["--model", arguments.model, "--preset", arguments.preset]
        words += ["--prompts", str(folder / "prompts.txt"), "--quiet"]
        started = time.monotonic()
        alone = [*COMMAND, "generate", *words, "--out", str(folder / "alone")]
        subprocess.run(
            alone, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        print(f"one process, one thread: {time.monotonic() - started:.1f} s")
        told = with_faults(words, folder / "fleet", arguments.processes_per_worker)
        sys.exit(compare(folder / "alone", folder / "fleet", told))


def with_faults(words: list[str], out: Path, processes: int) -> list[str]:
    """Run the fleet on a cluster whose nodes are killed; return the lines of its stdout."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=processes) for _ in range(2)]
    command = [*COMMAND, "fleet", "run", *words, "--out", str(out), "--address", cluster.address]
    command += ["--processes-per-worker", str(processes)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        for finished in KILL_AT:
            wait_for(driver, out, finished)
            victim = "a node"
            if processes > 1 and finished == KILL_AT[0]:
                victim = "a rank"
                os.kill(min(processes_of_ranks()), signal.SIGKILL)
            else:
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
            seconds = time.monotonic() - started
            print(f"killed {victim} after {len(clips(out))} clips, {seconds:.1f} s")
            if victim == "a node":
                nodes.append(cluster.add_node(num_cpus=processes))
        told, _ = driver.communicate()
    print(f"two workers, two faults: {time.monotonic() - started:.1f} s, exit {driver.returncode}")
    cluster.shutdown()
    print(f"processes of ranks that are left: {len(processes_of_ranks()) or 'none'}")
    return told.splitlines()


def processes_of_ranks() -> list[int]:
    """Return the process ids of all ranks of workers on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"pw_runtime.fleet.rank" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def wait_for(driver: subprocess.Popen[Any], out: Path, finished: int) -> None:
    """Wait until that many clips are there, or the driver has ended."""
    while len(clips(out)) < finished and driver.poll() is None:
        time.sleep(0.05)


def clips(folder: Path) -> dict[str, bytes]:
    """Return the clips in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def compare(alone: Path, fleet: Path, told: list[str]) -> int:
    """Print what is there; return 0 if all is as it would be without a fault."""
    expected, found = clips(alone), clips(fleet)
    same = sum(found.get(name) == content for name, content in expected.items())
    once = sorted(Path(line).name for line in told) == sorted(expected)
    left = sorted(path.name for path in fleet.iterdir() if path.suffix not in (".mp4", ".json"))
    print(f"{len(found)} clips, {same} of {len(expected)} with the same bytes")
    print(f"each told once: {once}; files left beside them: {left or 'none'}")
    return 0 if len(expected) == CLIPS == len(found) == same and once and not left else 1


if __name__ == "__main__":
    main()
