# SPDX-License-Identifier: Apache-2.0
"""Host memory of `pw generate` over time, for clips of several lengths.

Each clip is made by a process of its own whose resident memory is sampled from outside. If the
decode holds a few frames only, its peak does not depend on the length of the clip.

    python -m pw_bench.peers.generate_memory --model BUNDLE --out bench/results/NAME.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from pydantic import TypeAdapter

from pw_bench.measure.commit import commit
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.machine import Machine, describe

INTERVAL = 0.05  # seconds between samples

PRESET = """\
[draft]
width = 320
height = 192
steps = 1
shift = 5.0
guidance = 5.0
[highres]
width = {width}
height = {height}
steps = 1
shift = 5.5
guidance = 5.0
[video]
frames = {frames}
fps = 24
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipMemory:
    """One run. Samples are (seconds since start, resident bytes); marks are (seconds, line).

    What the decode adds is `peak_bytes - at_decode_start_bytes`; it should not grow with
    `frames`, while what the transformer leaves behind does.
    """

    frames: int
    seconds: float
    peak_bytes: int
    peak_before_decode_bytes: int
    at_decode_start_bytes: int
    clip_fp32_bytes: int  # what holding the decoded clip would take
    frame_fp32_bytes: int
    samples: list[tuple[float, int]]
    marks: list[tuple[float, str]]
    # By stage, "predicted" and "measured" bytes: the plan's account in the clip's receipt.
    plan: dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Content of the result file."""

    machine: Machine
    commit: str
    width: int
    height: int
    clips: list[ClipMemory]


def measure(model: Path, width: int, height: int, frames: int) -> ClipMemory:
    """Make one clip in a child process and watch its resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "preset.toml"
        preset.write_text(PRESET.format(width=width, height=height, frames=frames))
        command = [
            *(sys.executable, "-m", "pw_runtime", "generate", "--model", str(model)),
            *("--prompt", "a red ball", "--preset", str(preset), "--out", folder),
        ]
        start = time.monotonic()
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        samples: list[tuple[float, int]] = []
        sampler = threading.Thread(target=_sample, args=(child.pid, start, samples))
        sampler.start()
        assert child.stderr is not None
        lines = [(round(time.monotonic() - start, 2), line.strip()) for line in child.stderr]
        code = child.wait()
        sampler.join()
        receipt = Path(folder) / "0.json"
        plan = json.loads(receipt.read_text())["plan"]["stages"] if receipt.exists() else {}
    if code != 0:
        raise SystemExit(f"pw generate ended with {code}: {[line for _, line in lines]}")
    marks = [(t, line) for t, line in lines if re.search(r": \d+/\d+", line)]  # progress
    decode_start = next(t for t, line in marks if line.startswith("highres"))
    frame = 3 * width * height * 4
    return ClipMemory(
        frames=frames,
        seconds=round(samples[-1][0], 1),
        peak_bytes=max(rss for _, rss in samples),
        peak_before_decode_bytes=max(rss for t, rss in samples if t <= decode_start),
        at_decode_start_bytes=[rss for t, rss in samples if t <= decode_start][-1],
        clip_fp32_bytes=frame * frames,
        frame_fp32_bytes=frame,
        samples=samples[:: max(1, len(samples) // 400)],
        marks=marks,
        plan=plan,
    )


def _sample(pid: int, start: float, samples: list[tuple[float, int]]) -> None:
    process = psutil.Process(pid)
    while True:
        try:
            rss = process.memory_info().rss
        except psutil.NoSuchProcess:
            return
        if rss == 0:  # the process has ended and waits to be collected
            return
        samples.append((round(time.monotonic() - start, 2), rss))
        time.sleep(INTERVAL)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Bundle to run.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Result file.")
@click.option("--width", default=1280, show_default=True)
@click.option("--height", default=704, show_default=True)
@click.option("--frames", multiple=True, type=int, default=(17, 61, 121), show_default=True)
def main(model: Path, out: Path, width: int, height: int, frames: tuple[int, ...]) -> None:
    """Measure the host memory of clips of several lengths."""
    clips = []
    for count in frames:
        clip = measure(model, width, height, count)
        clips.append(clip)
        click.echo(
            f"{count:4d} frames {width}x{height}: peak {clip.peak_bytes / 2**20:7.0f} MiB, "
            f"before the decode {clip.peak_before_decode_bytes / 2**20:5.0f} MiB, "
            f"added by it {(clip.peak_bytes - clip.at_decode_start_bytes) / 2**20:5.0f} MiB, "
            f"the clip in fp32 {clip.clip_fp32_bytes / 2**20:6.0f} MiB, {clip.seconds:.0f} s"
        )
        for stage, one in clip.plan.items():
            predicted, measured = one["predicted"]["host"], one["measured"]["host"]
            click.echo(
                f"     {stage:<8} predicted {predicted / 2**20:6.0f} MiB, "
                f"measured {measured / 2**20:6.0f} MiB, {measured / predicted:.3f} of it"
            )
    result = Result(machine=describe(), commit=commit(), width=width, height=height, clips=clips)
    write_text(out, TypeAdapter(Result).dump_json(result, indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
