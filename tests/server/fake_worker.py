# SPDX-License-Identifier: Apache-2.0
"""A worker without a model: it writes small files, and behaves as the prompt says.

hold      the draft is there, then it waits until it is told to end
hold once the same, but only if it holds the draft for the first time
hold deaf the same, but it does not hear that it is to end
die       the process ends in the midst of the job
fail      the job fails
redo      the draft is there, then it is made again; half of it is there when it is told to end

Where the model's folder is gone it says that it cannot work, and ends. Where that has a file of the
device's name, it says nothing until it is ended. A file "joins" there has a line for each start,
with the host memory that it was given. 4k fits the device "large" alone, and fails on others.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pw_runtime.server.messages import (
    Advanced,
    Cancel,
    Ceased,
    Drafted,
    Event,
    Failed,
    Fit,
    Join,
    Made,
    Make,
    Ready,
    Refused,
    Undrafted,
    event_line,
    read_order,
)

RSS = 2**20
TOO_LARGE = "4k is too large"


def send(event: Event) -> None:
    sys.stdout.buffer.write(event_line(event))
    sys.stdout.buffer.flush()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def wait_for_end(job: str) -> None:
    while line := sys.stdin.buffer.readline():
        order = read_order(line)
        if isinstance(order, Cancel) and order.job == job:
            return


def make(job: Make) -> None:
    folder = Path(job.folder)
    send(Advanced(job=job.job, stage="draft", step=1, steps=2, fraction=0.25, seconds_left=3.0))
    if "die" in job.prompt:
        os._exit(9)
    if "fail" in job.prompt:
        send(Failed(job=job.job, code="bad_result", reason="out of memory", rss=RSS))
        return
    again = (folder / "draft" / "0.mp4").exists()
    if not again:
        write(folder / "draft" / "0.latents.safetensors", "latents")
        write(folder / "draft" / "0.json", "{}")
        write(folder / "draft" / "0.mp4", f"draft of {job.seed}")
        write(folder / "thumbnail.jpg", "picture")
    send(Drafted(job=job.job))
    send(Advanced(job=job.job, stage="highres", step=1, steps=4, fraction=0.5, seconds_left=2.0))
    if "redo" in job.prompt:
        send(Undrafted(job=job.job))
        shutil.rmtree(folder / "draft")
        write(folder / "draft" / "0.latents.safetensors", "half the latents")
        wait_for_end(job.job)
        send(Ceased(job=job.job, rss=RSS))
        return
    if "hold" in job.prompt and not ("once" in job.prompt and again):
        write(folder / "final" / "0.steps", "half a clip")
        wait_for_end("" if "deaf" in job.prompt else job.job)
        send(Ceased(job=job.job, rss=RSS))
        return
    if not job.draft_only:
        write(folder / "final" / "0.json", f'{{"seed": {job.seed}}}')
        write(folder / "final" / "0.mp4", f"clip of {job.seed}" + "." * 1000)
    send(Made(job=job.job, rss=RSS))


def main() -> None:
    join = read_order(sys.stdin.buffer.readline())
    assert isinstance(join, Join)
    if not Path(join.model).is_dir():
        send(Refused(reason=f"the model {join.model} is gone"))
        sys.exit(2)
    with (Path(join.model) / "joins").open("a") as file:
        file.write(f"{join.host_memory}\n")
    if (Path(join.model) / join.options.device).exists():
        sys.stdin.buffer.read()
        return
    fits = {
        name: Fit(fits=True, draft_fits=True)
        if name != "4k" or join.options.device == "large"
        else Fit(fits=False, draft_fits=True, reason=TOO_LARGE)
        for name in join.presets
    }
    too_large = [join.presets[name] for name, fit in fits.items() if not fit.fits]
    send(Ready(device="fake", bundle="0" * 64, presets=fits, rss=RSS))
    while line := sys.stdin.buffer.readline():
        order = read_order(line)
        if isinstance(order, Make) and order.preset in too_large:
            send(Failed(job=order.job, code="bad_request", reason=TOO_LARGE, rss=RSS))
        elif isinstance(order, Make):
            make(order)


if __name__ == "__main__":
    main()
