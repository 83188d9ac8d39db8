# SPDX-License-Identifier: Apache-2.0
"""One run: the state its stages share, and what surrounds each clip in each stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import WriteFailed
from pw_runtime.execution.decoder_lookup import on_engines
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.execution.protocols import Decoder
from pw_runtime.job.clip import (
    FRAMES,
    STEPS,
    TILES,
    Clip,
    latents_bytes,
    save_latents,
)
from pw_runtime.job.clip_receipt import write_clip_receipt
from pw_runtime.job.contact_sheet import SHEET, write_contact_sheet
from pw_runtime.job.failures import isolate_failure
from pw_runtime.job.follow import tell_of_decode
from pw_runtime.job.frame_log import FrameLog
from pw_runtime.job.journal import ClipLog, Journal
from pw_runtime.job.receipt import machine, versions
from pw_runtime.job.sources import sound_of
from pw_runtime.models import VaeDecoder
from pw_runtime.planning.oom_fallback import OomFallback
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.sampling.noise import tensor_digest
from pw_runtime.stages.write import VideoFile
from pw_runtime.system.atomic_files import require_room
from pw_runtime.system.progress import Reporter
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.run_progress import RunProgress
from pw_runtime.system.step import Step
from pw_runtime.system.stop import StopRequest
from pw_runtime.system.tile_store import TileStore, allocated_bytes, remove_tiles
from pw_runtime.system.trace import Stopwatch, span
from pw_runtime.types import (
    FrameChunk,
    Latent,
    Network,
    Notice,
    NoticeKind,
    Outcome,
    PixelFormat,
    Request,
    StageName,
    TextContext,
)

RETRY_SECONDS = 10  # between two attempts to write to a disk that refuses
Written = TypeVar("Written")
Net = TypeVar("Net")


@dataclass(frozen=True, slots=True)
class Run:
    """State shared by all stages of one run."""

    request: Request
    bundle: Bundle
    clips: tuple[Clip, ...]
    reporter: Reporter
    engines: Mapping[Network, EngineSet]
    fallback: OomFallback
    loading: Stopwatch
    journal: Journal
    ranks: Ranks | None = None  # that make a clip together; this one is the first
    warm: WarmNetworks | None = None  # of the process, where it makes more runs than this one
    stop: StopRequest = field(default_factory=StopRequest)
    progress: RunProgress = field(default_factory=RunProgress)  # expects the unfinished clips

    def shared_decode(
        self,
        decode: Callable[..., Generator[FrameChunk, None, None]],
        latent: Latent,
        pixels: PixelFormat,
    ) -> Generator[FrameChunk, None, None]:
        """Run a decode, on as many ranks as are planned; they hear of it with the first chunk.

        Args:
            decode: `decode_frames` with its arguments, all but the ranks.
            latent: in them.
            pixels: in them.
        """
        plan, compat = self.fallback.plan.decode, self.request.preset.compat
        ranks = self.ranks if plan.ranks > 1 else None
        if ranks is not None:
            tell_of_decode(ranks, plan, compat, pixels, latent, self.engines["vae"])
        with closing(decode(ranks=ranks)) as frames:  # also where they are not used up
            yield from frames

    def decoder_on(self, vae: VaeDecoder) -> Decoder:
        """Return the decoder on engines, where the current plan has it run on them."""
        return on_engines(vae, self.engines["vae"]) if self.fallback.plan.decode.engines else vae

    def tile_store(self, clip: Clip, latent: Latent, pixels: PixelFormat) -> TileStore | None:
        """Return the store of a clip's finished tiles; an earlier decode may have left some.

        None where the current plan decodes frame by frame.
        """
        if self.fallback.plan.decode.tiling.order != "tiles":
            return None
        made_of = self._made_of(clip, latent, pixels)
        return TileStore(clip.path(TILES), made_of, self.reporter.say)

    def frame_log(
        self, clip: Clip, latent: Latent, pixels: PixelFormat, step: Step
    ) -> FrameLog | None:
        """Return what keeps a clip's finished frames; an earlier decode may have left some.

        None where the current plan decodes tile by tile, or on several ranks.
        """
        plan = self.fallback.plan.decode
        if plan.tiling.order == "tiles" or plan.ranks > 1:
            return None
        return FrameLog(
            path=clip.path(FRAMES),
            made_of=self._made_of(clip, latent, pixels),
            journal=self.journal,
            step=step,
            spare=self.fallback.spare_host("decode"),
        )

    def _made_of(self, clip: Clip, latent: Latent, pixels: PixelFormat) -> dict[str, str]:
        """Return everything that decides the pixels of a clip's tiles."""
        plan, options, preset = self.fallback.plan.decode, clip.request.options, self.request.preset
        facts = machine(self.request.device)  # of this process: another one made the latents
        if self.request.device.type != "cpu":
            del facts["threads"]
        return {
            "latent": tensor_digest(latent.x),
            "decoder": clip.provenance.vae,
            "engines": self.engines["vae"].digest if plan.engines else "none",
            "options": ", ".join(
                (options.device, options.kernels, options.conv, options.vae_precision)
            ),
            "tiling": json.dumps(asdict(plan.tiling)),
            "compat": str(preset.compat),
            "pixels": pixels,
            **versions(),
            **{name: str(fact) for name, fact in facts.items()},
        }

    def clips_for(self, stage: StageName) -> Iterator[tuple[Clip, TextContext]]:
        """Yield the clips that come to a denoising stage next, with their text."""
        for clip in self.clips:
            if clip.needs == stage and clip.text is not None:
                yield clip, clip.text

    def step_log(self, clip: Clip, stage: StageName, step: Step) -> ClipLog:
        """Return what keeps the clip's steps in a stage."""
        return ClipLog(
            clip=clip,
            stage=stage,
            chunk=lambda: self.fallback.plan.transformers[stage].chunk,
            journal=self.journal,
            step=step,
        )

    def unfinished(self) -> Iterator[Clip]:
        """Yield the clips that have not failed and have no video yet."""
        for clip in self.clips:
            if clip.error is None and clip.video is None:
                yield clip

    @contextmanager
    def step(
        self, clip: Clip, stage: str, total: int | None = None, *, timed: bool = True
    ) -> Iterator[Step]:
        """Isolate one clip's way through a stage: its failure, progress, time and notices.

        Args:
            clip: the clip.
            stage: name of the stage.
            total: units of progress; None shows none.
            timed: count the whole step's time under the stage's name.
        """
        with isolate_failure(clip, self.reporter):
            self.progress.enter(clip.target, stage, total or 1)
            yield Step(
                label=f"{stage} {clip.prompt.id}",
                reporter=self.reporter,
                total=total,
                stopwatch=clip.stopwatch,
                timed_as=stage if timed else None,
                add_notice=partial(self.add_notice, (clip,)),
                stop=self.stop,
                progress=self.progress,
            )
            self.progress.finish()
        if clip.error is not None:
            self.progress.drop(clip.target)
            clip.release_tensors()

    def shared_step(self, label: str, clips: Sequence[Clip]) -> Step:
        """Return a step that concerns several clips; its time counts as loading."""
        return Step(
            label=label,
            reporter=self.reporter,
            stopwatch=self.loading,
            timed_as="load",
            add_notice=lambda kind, text: self.add_notice(clips, kind, f"{label}: {text}"),
            stop=self.stop,
        )

    def add_notice(self, clips: Iterable[Clip], kind: NoticeKind, text: str) -> None:
        """Tell the user something once, and record it in the receipts of `clips`."""
        clips = tuple(clips)
        for clip in clips:
            if all(text != known.text for known in clip.notices):  # an earlier run may have it
                clip.notices.append(Notice(kind=kind, text=text))
        prefix = f"prompt {clips[0].prompt.id}: " if len(clips) == 1 else ""
        tell = self.reporter.say if kind in ("approximation", "source") else self.reporter.warn
        tell(prefix + text)

    def keep_text(self, clip: Clip) -> None:
        """Write the clip's text contexts to the disk; where that fails, they are only in memory."""
        if self.journal.refused:
            return
        try:
            with clip.stopwatch.stage("latents"):
                save_latents(clip, self.request.out)
        except WriteFailed as error:
            self.journal.refuse(error)

    def save_latents(self, clip: Clip) -> None:
        """Write the clip's tensors to the disk; after its last stage they wait there alone.

        Where the output folder refuses them they go to the spill folder, or stay in memory; without
        a spill folder the run waits, if the user asked for that, or computes no further clip, of
        which nothing could be kept.
        """
        spill = self.request.spill
        try:
            with clip.stopwatch.stage("latents"):
                write = partial(save_latents, clip, clip.request.out)
                write() if spill else self._retrying(write)
        except WriteFailed as error:
            if spill is None:
                text = f"its latents stay in memory until they are decoded: {error}"
                self.add_notice((clip,), "disk", text)
                self._stop_before_next(clip)
                return
            with clip.stopwatch.stage("latents"):
                path = self._retrying(partial(save_latents, clip, spill))
            self.add_notice((clip,), "disk", f"its latents are in {path}: {error}")
        self._drop_earlier(clip)
        self.journal.drop(clip)
        if clip.latents is not None:
            clip.release_tensors()

    def _drop_earlier(self, clip: Clip) -> None:
        """Remove what the other one of output and spill folder has of the clip's earlier stages."""
        out, spill = self.request.out, self.request.spill
        if clip.kept is None or spill is None:
            return
        try:
            if not out.samefile(spill):
                other = spill if clip.kept.parent == out else out
                (other / clip.kept.name).unlink(missing_ok=True)
        except OSError as error:
            self.reporter.warn(f"could not remove {error.filename}: {error.strerror}")

    def _stop_before_next(self, clip: Clip) -> None:
        """Fail every clip that would be computed after this one in the current stage."""
        for other in self.clips[self.clips.index(clip) + 1 :]:
            if other.needs not in (None, "decode"):
                other.error = f"not computed: the latents of {clip.prompt.id} could not be written"
                self.reporter.failed(other.prompt.id, other.error)
                self.progress.drop(other.target)
                other.release_tensors()

    def require_room(self) -> None:
        """Raise WriteFailed where what the unfinished clips need does not fit on the disk.

        That is their latents, and the finished tiles of one clip, if it is decoded tile by tile. An
        earlier decode of the next clip may have left a file for those.
        """
        following = next(self.unfinished(), None)
        if following is None:
            return
        latents = sum(latents_bytes(clip) for clip in self.unfinished() if clip.latents is None)
        out, spill = following.request.out, self.request.spill  # clips of a decode have their own
        tiles = self.fallback.plan.decode.store_bytes
        tiles = max(0, tiles - allocated_bytes(following.path(TILES)))
        if spill is None:
            latents, tiles = latents + tiles, 0
        self._retrying(partial(require_room, spill or out, latents))
        if tiles:
            self._retrying(partial(require_room, out, tiles))

    def _retrying(self, write: Callable[[], Written]) -> Written:
        """Call `write` until the disk allows it, if the user asked for that; else once.

        Raises WriteFailed.
        """
        told = False
        while True:
            try:
                return write()
            except WriteFailed as error:
                if not self.request.wait_for_disk:
                    raise
                if not told:
                    self.reporter.warn(f"waiting until this can be written: {error}")
                told = True
            time.sleep(RETRY_SECONDS)

    def sound_of(self, clip: Clip) -> Path | None:
        """Return the file whose sound the clip gets, and tell the user what becomes of it."""
        path, told = sound_of(clip)
        if told is not None:
            self.add_notice((clip,), "source", told)
        return path

    def write_receipt(self, clip: Clip, video: VideoFile) -> None:
        """Write the receipt of a video that is complete but for its name. Raises WriteFailed."""
        self.fallback.record_peak("decode")
        with span("receipt"):
            write_clip_receipt(clip, self.loading.seconds.get("load", 0.0), video, self.fallback)

    def finish(self, clip: Clip) -> None:
        """Report a finished video, and remove latents that nobody asked to keep."""
        clip.video = clip.target
        self.reporter.finished(clip.video)
        self.clear(clip)

    def clear(self, clip: Clip) -> None:
        """Remove what a finished clip no longer needs, from the disk and from memory."""
        self.journal.drop(clip)
        try:
            remove_tiles(clip.path(TILES))
            for ending in (STEPS, FRAMES):
                clip.path(ending).unlink(missing_ok=True)
            if clip.latents is not None and not clip.keeps_latents:
                clip.latents.unlink(missing_ok=True)
        except OSError as error:
            self.reporter.warn(f"could not remove {error.filename}: {error.strerror}")
        clip.release_tensors()

    def write_contact_sheet(self) -> None:
        """Write the contact sheet of the finished clips, if asked for. Raises WriteFailed."""
        rows = [clip.sheet_row() for clip in self.clips if clip.filmstrips]
        if self.request.contact_sheet and 0 < len(rows) < len(self.clips):
            missing = [clip.prompt.id for clip in self.clips if not clip.filmstrips]
            self.reporter.say(f"the contact sheet lacks clips not made in this run: {missing}")
        if self.request.contact_sheet and not rows:
            self.reporter.warn(
                "no contact sheet: it shows the clips that a run makes, and this one made none"
            )
        elif self.request.contact_sheet:
            with span("contact sheet"):
                path = self.request.out / SHEET
                write_contact_sheet(rows, path)
                self.reporter.say(f"contact sheet: {path}")

    def outcomes(self) -> tuple[Outcome, ...]:
        """Return the result for every prompt, in order."""
        return tuple(clip.outcome() for clip in self.clips)
