# SPDX-License-Identifier: Apache-2.0
"""Jobs in the process that makes them: the draft in a run of its own, then the clip from it."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.lora import with_loras
from pw_runtime.errors import OtherDraft
from pw_runtime.job.checks import check_content, pick_device
from pw_runtime.models.quantized_linear import require_quantizable
from pw_runtime.pipeline import generate
from pw_runtime.planning.time_estimate import measure_rates
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.planning.workload import budget_of
from pw_runtime.server.admission import Admission
from pw_runtime.server.files import CLIP, LATENTS, PICTURE, THUMBNAIL
from pw_runtime.server.messages import (
    Advanced,
    Drafted,
    Event,
    Join,
    Make,
    Undrafted,
    stage_named,
)
from pw_runtime.system.atomic_files import atomic_file
from pw_runtime.system.progress import Progress, Reporter
from pw_runtime.system.stop import StopRequest
from pw_runtime.types import Preset, Prompt, Request

THUMBNAIL_WIDTH = 320
INTERVAL = 0.1  # seconds between two events of a stage


class Maker:
    """Makes jobs on one device, with networks that stay loaded as far as memory allows.

    Attributes:
        bundle: the converted checkpoint.
        device: that it computes on.
        fits: the planner's word on every preset on offer.
    """

    def __init__(self, join: Join, send: Callable[[Event], None]) -> None:
        """Open the bundle and plan all presets. Raises BadRequest, BadWeights."""
        self.bundle = with_loras(open_bundle(join.model), join.loras)
        device = pick_device(join.options.device)
        self.device, self._torch_device = str(device), device
        self._options = replace(join.options, device=self.device, save_latents=False)
        for preset in join.presets.values():
            self._check_options(preset)
        # Of the start: what is free later lacks what is kept loaded.
        budget = budget_of(device, join.gpu_memory, join.host_memory)
        self._gpu_memory, self._host_memory = budget.device, budget.host
        rates = measure_rates(device, self._options.compute_precision)
        self._admission = Admission(self.bundle, self._options.resolved(), budget, rates)
        self.fits = self._admission.fits(join.presets)
        self._warm = WarmNetworks()
        self._warm_preset: Preset | None = None
        self._send = send

    def _check_options(self, preset: Preset) -> None:
        """Raise BadRequest for options that no job of a preset could be made with."""
        prompts = (Prompt("checked", id=CLIP),)
        request = Request(prompts=prompts, preset=preset, out=Path(), options=self._options)
        check_content(request)
        networks = self.bundle.networks
        for entry in filter(None, (networks.draft, networks.highres)):
            require_quantizable(entry.config, self._options.linear)

    def make(self, job: Make, stop: StopRequest) -> None:
        """Make a job's draft, unless it is there, and its clip.

        Raises:
            Stopped: `stop` was requested; what is finished stays in the folder.
            PixelWizardError: the clip cannot be made.
        """
        ends_with_draft = job.draft_only or job.preset.highres is None
        if job.preset != self._warm_preset:  # of another one no network is taken again
            self._warm.release()
            self._warm_preset = job.preset
        self._warm.only = self._admission.kept(job.preset, draft_only=ends_with_draft)
        self._warm.keep_only(self._warm.only)
        runs = self._seconds(job, ends_with_draft=ends_with_draft)
        reporter = _JobReporter(job.job, self._send, runs)
        self._draft(job, reporter, stop)
        if ends_with_draft:
            return
        reporter.next_run()
        try:
            self._finish(job, reporter, stop)
        except OtherDraft as error:
            if job.finishes is not None:
                raise OtherDraft(
                    f"the draft of {job.finishes} cannot be finished by this server",
                    got=error.got,
                    do="ask for the clip by its prompt and seed, without draft_id",
                ) from error
            reporter.warn(f"its draft is made again: {error.what} ({error.got})")
            self._send(Undrafted(job=job.job))
            shutil.rmtree(Path(job.folder) / "draft")
            (Path(job.folder) / THUMBNAIL).unlink()
            self._draft(job, reporter, stop)
            self._finish(job, reporter, stop)

    def recover(self) -> None:
        """Free what a failed job left.

        Raises what the GPU raises for all further work, where an error has broken its context.
        """
        gc.collect()  # tracebacks can form cycles, which hold tensors
        if self._torch_device.type != "cuda":
            return
        with suppress(torch.OutOfMemoryError):  # other processes have it, for a while
            torch.zeros(1, device=self._torch_device)
        torch.cuda.synchronize(self._torch_device)

    def _draft(self, job: Make, reporter: Reporter, stop: StopRequest) -> None:
        """Make the draft and its small picture, unless they are there."""
        folder = Path(job.folder)
        draft, has_highres = folder / "draft", job.preset.highres is not None
        if not ((draft / f"{CLIP}.mp4").is_file() and (draft / LATENTS).is_file()):
            self._run(job, draft, reporter, stop, draft_only=has_highres, save_latents=True)
        if not (folder / THUMBNAIL).is_file():
            middle = job.preset.video.frames // 2
            write_thumbnail(draft / f"{CLIP}.mp4", middle, folder / THUMBNAIL)
        self._send(Drafted(job=job.job))

    def _finish(self, job: Make, reporter: Reporter, stop: StopRequest) -> None:
        """Make the clip of the draft."""
        out, drafts = Path(job.folder) / "final", Path(job.folder) / "draft"
        self._run(job, out, reporter, stop, draft_only=False, save_latents=False, drafts=drafts)

    def _seconds(self, job: Make, *, ends_with_draft: bool) -> tuple[float, ...]:
        """Estimate the seconds of each run of a job."""
        if ends_with_draft:
            return (1.0,)
        first = self._admission.seconds(job.preset, draft_only=True)
        whole = self._admission.seconds(job.preset, draft_only=False)
        return sum(first.values()), sum(whole.values()) - whole["draft"]

    def _run(
        self,
        job: Make,
        out: Path,
        reporter: Reporter,
        stop: StopRequest,
        *,
        draft_only: bool,
        save_latents: bool,
        drafts: Path | None = None,
    ) -> None:
        options = replace(self._options, draft_only=draft_only, save_latents=save_latents)
        image = Path(job.folder) / PICTURE if job.picture else None
        request = Request(
            prompts=(Prompt(job.prompt, id=CLIP, image=image),),
            preset=job.preset,
            out=out,
            negative=job.negative,
            seed=job.seed,
            options=options,
            drafts=drafts,
            overwrite=True,
            gpu_memory=self._gpu_memory,
            host_memory=self._host_memory,
            fail_fast=True,
        )
        generate(request, self.bundle, reporter, warm=self._warm, stop=stop)


class _JobReporter(Reporter):
    """Turns the progress of a job's runs into that of the job."""

    def __init__(self, job_id: str, send: Callable[[Event], None], runs: Sequence[float]) -> None:
        """Send events of a job whose runs take about so many seconds each."""
        super().__init__(quiet=True)
        self._job, self._send, self._runs = job_id, send, runs
        self._current = 0
        self._began = time.monotonic()
        self._told, self._stage = 0.0, ""

    def next_run(self) -> None:
        """Count on in the next run."""
        self._current += 1
        self._began = time.monotonic()

    def warn(self, text: str) -> None:
        """Print a line, with the job that it is about."""
        super().warn(f"{self._job}: {text}")

    def finished(self, path: Path) -> None:
        """Say nothing: a job is not finished with every run."""

    def progress(self, progress: Progress) -> None:
        """Send the progress of a run, but not too often."""
        now = time.monotonic()
        if progress.stage == self._stage and now - self._told < INTERVAL:
            return
        self._told, self._stage = now, progress.stage
        before = sum(self._runs[: self._current])
        expected, after = self._runs[self._current], sum(self._runs[self._current + 1 :])
        left = progress.seconds_left
        if left is not None:  # later runs are as much slower than expected as this one
            left += after * (now - self._began + left) / expected
        self._send(
            Advanced(
                job=self._job,
                stage=stage_named(progress.stage),
                step=round(progress.done, 3),
                steps=progress.total,
                fraction=min(1.0, (before + expected * progress.fraction) / sum(self._runs)),
                seconds_left=None if left is None else round(left, 1),
            )
        )


def write_thumbnail(video: Path, index: int, target: Path) -> None:
    """Write a small picture of one frame of a video. Raises WriteFailed."""
    import av
    from PIL import Image

    with av.open(str(video)) as container:
        frame = next(islice(container.decode(video=0), index, None))
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    height = max(1, round(image.height * THUMBNAIL_WIDTH / image.width))
    with atomic_file(target) as partial:
        image.resize((THUMBNAIL_WIDTH, height)).save(partial, "JPEG", quality=85)
