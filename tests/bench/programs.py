# SPDX-License-Identifier: Apache-2.0
"""Helpers for the benchmark's programs: small jobs, and a clip made under a trace."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pw_bench.e2e.job import Job, Program
from pw_export.convert import convert
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.pipeline import generate
from pw_runtime.presets import PRESETS
from pw_runtime.prompts import make_prompts
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Span, Trace
from pw_runtime.types import (
    Codec,
    Preset,
    Request,
    RunOptions,
    StageConfig,
    TilingConfig,
    VideoConfig,
)
from tests.oracle.checkpoint import write_official_checkpoint

DRAFT = StageConfig(width=96, height=64, steps=3, shift=5.0, guidance=5.0)
HIGHRES = StageConfig(width=128, height=96, steps=2, shift=5.5, guidance=4.0)
TWO_STAGES = Preset(
    draft=DRAFT, highres=HIGHRES, video=VideoConfig(frames=9), decode=TilingConfig(strips=2)
)
ONE_STAGE = Preset(draft=DRAFT, video=VideoConfig(frames=9))
# For programs that are replaced: nothing of it exists.
NO_JOB = Job(
    checkpoint=Path(),
    bundle=Path(),
    prompt="a",
    negative="",
    preset=PRESETS["nano"],
    noise=Path(),
    device="cpu",
    precision="fp32",
    codec="h264",
    in_memory="5b",
)


@dataclass(frozen=True)
class TracedClip:
    """A clip of a program and what its trace recorded."""

    latents: list[Tensor]  # after every step, in order
    spans: list[str]  # names, in the order in which they began, of the thread that called
    timeline: list[Span]
    frames: int


def make_job(checkpoint: Path, folder: Path, preset: Preset, codec: Codec = "h264") -> Job:
    """Return a job on a checkpoint in the official layout; its noise is written to `folder`."""
    generator = torch.Generator().manual_seed(7)
    noise = {
        f"{stage}_noise": torch.randn(latent_shape(config, preset.video), generator=generator)
        for stage, config in preset.stages().items()
    }
    save_file(noise, folder / "noise.safetensors")
    return Job(
        checkpoint=checkpoint,
        bundle=checkpoint.with_name("bundle"),
        prompt="a red   ball &amp;amp; a cat",
        negative="blurry",
        preset=preset,
        noise=folder / "noise.safetensors",
        device="cpu",
        precision="fp32",
        codec=codec,
    )


def write_checkpoint(folder: Path) -> Path:
    """Write a small random checkpoint in one folder, and its bundle beside it."""
    files = write_official_checkpoint(folder)
    (files.base / "pixelwizard").mkdir()
    highres = files.highres.rename(files.base / "pixelwizard" / "highres.pt")
    convert(wan=files.base, highres=highres, out=folder / "bundle", say=lambda line: None)
    return files.base


def run_traced(program: Program, job: Job, video: Path) -> TracedClip:
    """Run a program under a trace."""
    latents: list[Tensor] = []
    trace = Trace(torch.device("cpu"), on_tensor=lambda name, x: latents.append(x.clone()))
    with trace.recording():
        program.clip(job, video)
    timeline = sorted(trace.spans, key=lambda span: (span.start, span.depth))
    names = [span.name for span in timeline if span.thread == threading.current_thread().name]
    return TracedClip(latents, names, trace.spans, len(read_video(video)))


def read_video(path: Path) -> Tensor:
    """Read frames [F, H, W, 3] in levels of 255."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).int()


def runtime_latents(job: Job, out: Path) -> dict[str, Tensor]:
    """Return the latents of the runtime's own clip, by stage."""
    request = Request(
        prompts=make_prompts([("0", job.prompt)]),
        preset=job.preset,
        out=out,
        negative=job.negative,
        noise=job.noise,
        options=RunOptions(codec=job.codec, save_latents=True),
    )
    out.mkdir()
    (outcome,) = generate(request, open_bundle(job.bundle), Reporter(quiet=True))
    assert outcome.video is not None
    return load_file(out / "0.latents.safetensors")
