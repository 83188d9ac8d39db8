# SPDX-License-Identifier: Apache-2.0
"""Host memory of whole clips over time, for clips of several lengths.

Each clip is made by a process of its own whose memory is sampled from outside. If the decode holds
only a few frames, the memory that it adds does not depend on the length of the clip.

    pw bench generate-memory --model BUNDLE --out bench/results/NAME.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pw_bench.choices import OURS
from pw_bench.e2e.job import Job
from pw_bench.e2e.process import ProcessRun, ProgramFailed, run_process
from pw_bench.e2e.weights import write_noise
from pw_bench.e2e.worker import Task
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.memory_sampler import between
from pw_bench.result_sections import Clip
from pw_bench.results import Figure, Result
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadResult
from pw_runtime.job.checks import default_precision, pick_device
from pw_runtime.types import OFFICIAL_NEGATIVE, Preset, StageConfig, VideoConfig

DRAFT = StageConfig(width=320, height=192, steps=1, shift=5.0, guidance=5.0)


def measure_generate_memory(
    model: Path, width: int, height: int, frames: Sequence[int], say: Callable[[str], None]
) -> Result:
    """Measure the host memory of clips of several lengths.

    Args:
        model: bundle.
        width: of the clips, in pixels.
        height: of the clips, in pixels.
        frames: number of frames of each clip.
        say: receives progress.

    Raises BadRequest, BadWeights, BadResult where a clip cannot be made.
    """
    bundle = open_bundle(model)
    device = pick_device("auto")
    identity = identify(device)
    highres = StageConfig(width=width, height=height, steps=1, shift=5.5, guidance=5.0)
    clips = []
    for count in frames:
        preset = Preset(draft=DRAFT, highres=highres, video=VideoConfig(frames=count, fps=24))
        run = make_clip(model, preset, device)
        identity = replace(identity, engines=run.engines, operations=run.operations)
        clips.append(replace(run.clips[0], side=f"{count} frames"))
        say(f"{count} frames: {clips[-1].wall:.0f} s")
    return replace(
        envelope(
            "generate-memory",
            {
                "words": "`pw generate --policy eager`, one step a stage, a process for each clip",
                "clip": f"{width}x{height}, draft {DRAFT.width}x{DRAFT.height}",
                "frames": ", ".join(str(count) for count in frames),
                "device": device.type,
            },
            replace(identity, weights={model.name: f"sha256:{bundle.digest}"}),
        ),
        figures=tuple(
            figure
            for clip, count in zip(clips, frames, strict=True)
            for figure in figures_of(clip, 3 * width * height * 4 * count)
        ),
        sides={clip.side: f"a clip of {clip.side}" for clip in clips},
        clips=tuple(clips),
    )


def make_clip(model: Path, preset: Preset, device: torch.device) -> ProcessRun:
    """Make one clip in a process of its own. Raises BadResult where it fails."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        videos = folder / "videos"
        videos.mkdir()
        job = Job(
            checkpoint=model,
            bundle=model.resolve(),
            prompt="a red ball",
            negative=OFFICIAL_NEGATIVE,
            preset=preset,
            noise=write_noise(preset, folder / "noise.safetensors"),
            device=str(device),
            precision=default_precision(None, device),
            codec="h264",
        )
        try:
            return run_process(Task(program=OURS, job=job, folder=videos, clips=1), {}, None)
        except ProgramFailed as error:
            raise BadResult("the clip could not be made", got=error) from error


def figures_of(clip: Clip, clip_bytes: int) -> tuple[Figure, ...]:
    """Return peak memory, what the decode adds, and what holding the decoded clip would take.

    Args:
        clip: a clip with spans and samples of host memory.
        clip_bytes: size of the decoded clip in fp32.
    """
    start = max(span.end for span in clip.spans if span.name.partition(" ")[0] == "highres")
    before = [size for _, size in between(list(clip.host), 0.0, start)]
    sizes = {
        "peak": clip.peaks["rss"],
        "peak before the decode": max(before),
        "added by the decode": clip.peaks["rss"] - before[-1],
    }
    measured = tuple(
        Figure(name=f"{clip.side}/{name}", unit="B", samples=(size,))
        for name, size in sizes.items()
    )
    held = Figure(
        name=f"{clip.side}/the clip in fp32", unit="B", samples=(clip_bytes,), counted=True
    )
    return (*measured, held)
