# SPDX-License-Identifier: Apache-2.0
"""The whole program: prompt -> text -> draft -> condition -> highres -> decode -> write.

Each stage runs over all prompts before the next begins, so that every network is loaded once
and only one is in memory. Before anything is decoded, all latents are on the disk. A prompt that
fails does not take the others with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from pw_kernels.launcher import tally
from pw_kernels.op import using
from pw_runtime.checkpoint.bundle import Bundle, verify
from pw_runtime.checkpoint.loader import check_networks, load_decoder, load_text_network
from pw_runtime.errors import WriteFailed
from pw_runtime.execution.decoder_lookup import choose_decoder, decoder_on
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.job.clip import (
    Clip,
    collect_thumbnails,
    refuse_overwriting_latents,
    save_latents,
    start_clip,
    write_clip_receipt,
)
from pw_runtime.job.contact_sheet import Filmstrip, write_contact_sheet
from pw_runtime.job.failures import isolate_failure, report_on_abort, require_finite
from pw_runtime.job.preflight import check_request
from pw_runtime.models import VaeDecoder
from pw_runtime.models.text_encoder import TextNetwork
from pw_runtime.planning.loaded import Loaded, load_transformer, pick_engines
from pw_runtime.planning.oom_fallback import OomFallback, fit
from pw_runtime.sampling.noise import load_noise
from pw_runtime.stages.codecs import pixel_format_for
from pw_runtime.stages.condition import condition
from pw_runtime.stages.decode import decode
from pw_runtime.stages.draft import draft
from pw_runtime.stages.highres import highres
from pw_runtime.stages.text import encode_text
from pw_runtime.stages.write import write_video
from pw_runtime.system.progress import Reporter, count_frames
from pw_runtime.system.trace import Stopwatch, span
from pw_runtime.types import (
    Network,
    Outcome,
    Request,
    StageConfig,
    StageName,
    TextContext,
    TilingConfig,
)


@dataclass(frozen=True, slots=True)
class Run:
    """What all steps of one run share."""

    request: Request
    bundle: Bundle
    clips: tuple[Clip, ...]
    loading: Stopwatch
    reporter: Reporter
    engines: Mapping[Network, EngineSet]
    fitting: OomFallback


def generate(request: Request, bundle: Bundle, reporter: Reporter) -> tuple[Outcome, ...]:
    """Make a clip of every prompt.

    Args:
        request: what to make.
        bundle: the converted checkpoint.
        reporter: told about progress.

    Returns:
        One outcome per prompt, in order.

    Raises:
        BadRequest, BadWeights: the request or the bundle cannot work; nothing was computed.
        WriteFailed: the contact sheet could not be written; all clips are finished.
        KeyboardInterrupt: finished clips are on disk, and the latents that were; said which.
    """
    check_request(request)
    noise = {}
    if request.noise is not None:
        noise = load_noise(request.noise, request.stages, request.preset.video)
    with span("check networks"):
        check_networks(bundle, request.stages, request.attention_kernel)
    tally.clear()
    with span("engines"):
        engines: dict[Network, EngineSet] = {
            stage: pick_engines(request, bundle, stage, reporter) for stage in request.stages
        }
        engines["vae"] = choose_decoder(request, bundle, reporter.say)
    with span("plan"):
        fitting = fit(request, bundle, reporter, engines)
    cut = fitting.plan.decode.cut
    with span("noise"):
        clips = tuple(
            start_clip(request, one, noise, bundle, engines, cut) for one in request.prompts
        )
    refuse_overwriting_latents(clips)
    reporter.say(f"checking the files of {bundle.root}")
    with span("check files"):
        verify(bundle)
    run = Run(request, bundle, clips, Stopwatch(request.device), reporter, engines, fitting)
    if noise and len(clips) > 1:
        notify(run, clips, f"every prompt of this run starts from the noise in {request.noise}")
    with (
        torch.inference_mode(),
        using(request.kernels, attention=request.attention_kernel),
        report_on_abort(clips, reporter),
    ):
        for stage, work in STAGES.items():
            with run.fitting.measuring(stage):
                work(run)
    rows = [clip.sheet_row() for clip in clips if clip.video is not None]
    if request.contact_sheet and rows:
        with span("contact sheet"):
            write_contact_sheet(rows, request.out / "contact_sheet.png")
    return tuple(clip.outcome() for clip in clips)


def encode_texts(run: Run) -> None:
    """Prompts -> text contexts; the negative prompt is encoded once."""
    request, bundle, reporter = run.request, run.bundle, run.reporter
    text_len = bundle.networks.draft.config.text_len

    def begin() -> tuple[TextNetwork, Tensor]:
        on = request.device if run.fitting.plan.text == "device" else torch.device("cpu")
        net = load_text_network(bundle, request.precision, on)
        cut = partial(notify, run, run.clips)
        return net, encode_text(request.negative, net, text_len, lambda it: cut(f"negative {it}"))

    with run.loading.stage("load", "text encoder"):
        net, uncond = run.fitting.attempt(
            "text", begin, lambda: None, partial(notify, run, run.clips)
        )
        uncond = uncond.to(request.device)
    with reporter.steps("text", len(run.clips)) as advance:
        for clip in run.clips:
            with isolate_failure(clip, reporter), clip.watch.stage("text"):
                cond = encode_text(clip.prompt.text, net, text_len, partial(notify, run, (clip,)))
                clip.text = TextContext(cond=cond.to(request.device), uncond=uncond)
            advance()


def make_drafts(run: Run) -> None:
    """Text contexts -> draft latents."""
    with loaded_for(run, "draft") as loaded:
        for clip in run.clips:
            if clip.text is None:
                continue
            with isolate_failure(clip, run.reporter):
                work = partial(draft_clip, run, clip, run.request.preset.draft)
                loaded.attempt(work, partial(notify, run, (clip,)))
                if clip.last_stage == "draft":
                    spill_latents(run, clip)


def draft_clip(run: Run, clip: Clip, plan: StageConfig, net: SegmentedDiT) -> None:
    """One clip's text -> its draft latent. After an exception the clip is as before."""
    assert clip.text is not None
    with (
        run.reporter.steps(f"draft {clip.prompt.id}", plan.steps) as advance,
        clip.watch.stage("draft"),
    ):
        compat = run.request.preset.compat
        latent = draft(clip.text, clip.noise_for("draft"), plan, compat, net, advance)
        clip.draft = require_finite(latent, "draft")


def loaded_for(run: Run, stage: StageName) -> Loaded:
    """A stage's transformer, loaded as the plan has it when it is first used."""

    def load() -> SegmentedDiT:
        plan = run.fitting.plan.networks[stage]
        return load_transformer(run.request, run.bundle, stage, run.engines[stage], plan)

    return Loaded(stage, load, run.fitting, run.loading)


def make_highres(run: Run) -> None:
    """Draft latents -> high-res latents; the transformer is let go at the end."""
    plan = run.request.stages.get("highres")
    waiting = [clip for clip in run.clips if clip.draft is not None]
    if plan is None or not waiting:
        return
    with loaded_for(run, "highres") as loaded:
        for clip in waiting:
            with isolate_failure(clip, run.reporter):
                work = partial(paint_clip, run, clip, plan)
                loaded.attempt(work, partial(notify, run, (clip,)))
                spill_latents(run, clip)
            if clip.error is not None:
                clip.release_tensors()


def paint_clip(run: Run, clip: Clip, plan: StageConfig, net: SegmentedDiT) -> None:
    """One clip's draft latent -> its high-res latent. After an exception the clip is as before."""
    assert clip.text is not None
    assert clip.draft is not None
    with clip.watch.stage("condition"):
        conditioning = condition(clip.draft, plan)
        noise = clip.noise_for("highres")
    with (
        run.reporter.steps(f"highres {clip.prompt.id}", plan.steps) as advance,
        clip.watch.stage("highres"),
    ):
        compat = run.request.preset.compat
        latent = highres(clip.text, conditioning, noise, plan, compat, net, advance)
        clip.highres = require_finite(latent, "high-res")


def spill_latents(run: Run, clip: Clip) -> None:
    """The clip's tensors go to the disk, where they wait for the decode."""
    try:
        with clip.watch.stage("latents"):
            save_latents(clip)
    except WriteFailed as error:  # better a clip without that than none
        notify(run, (clip,), f"its latents stay in memory until they are decoded: {error}")
    else:
        clip.release_tensors()


def decode_clips(run: Run) -> None:
    """Latents files -> video files and receipts. `pw decode` is this alone."""
    waiting = [clip for clip in run.clips if clip.error is None]
    if not waiting:
        return
    with run.loading.stage("load", "vae"):
        vae = load_decoder(run.bundle, run.request.device, run.request.vae_precision)
    for clip in waiting:
        with isolate_failure(clip, run.reporter):
            size = run.fitting.attempt(
                "decode",
                partial(decode_clip, run, clip, vae),
                lambda: None,
                partial(notify, run, (clip,)),
            )
            run.fitting.measure("decode")
            finish_clip(run, clip, size)
        clip.release_tensors()


def decode_clip(run: Run, clip: Clip, vae: VaeDecoder) -> int:
    """One clip's last latent -> its video file, whose bytes are returned. After an exception the
    clip is as before and the file is not there."""
    request, preset, watch = clip.request, clip.request.preset, clip.watch
    stage, plan = clip.last_stage, clip.request.stages[clip.last_stage]
    with watch.stage("latents"):
        latent = clip.latent_of(stage)
    way = run.fitting.plan.decode
    painter = decoder_on(vae, run.engines["vae"]) if way.engines else vae
    strips: list[Filmstrip] = []
    if request.contact_sheet and stage == "highres":
        preview_draft(clip, vae, strips)
    if clip.growing is not None:
        run.reporter.say(f"{clip.growing} can be watched while it grows")
    pixels = pixel_format_for(request.codec, preset.compat)
    with run.reporter.steps(f"decode {clip.prompt.id}", preset.video.frames) as advance:
        chunks = watch.time_items("decode", decode(latent, way.cut, preset.compat, painter, pixels))
        if request.contact_sheet:
            chunks = collect_thumbnails(clip, stage, chunks, strips)
        with watch.stage("write"):
            size = write_video(
                count_frames(chunks, advance),
                clip.target,
                width=plan.width,
                height=plan.height,
                frames=preset.video.frames,
                fps=preset.video.fps,
                codec=request.codec,
                growing=clip.growing,
            )
    clip.strips = tuple(strips)
    return size


def preview_draft(clip: Clip, vae: VaeDecoder, strips: list[Filmstrip]) -> None:
    """Decode the draft for the contact sheet alone."""
    with clip.watch.stage("preview"):
        chunks = decode(clip.latent_of("draft"), TilingConfig(), clip.request.preset.compat, vae)
        for _ in collect_thumbnails(clip, "draft", chunks, strips):
            pass


def finish_clip(run: Run, clip: Clip, video_bytes: int) -> None:
    """The video is there: write the receipt, and remove the latents file that nobody asked for."""
    with span("receipt"):
        write_clip_receipt(clip, run.loading.seconds["load"], video_bytes, run.fitting)
    clip.video = clip.target
    run.reporter.finished(clip.video)
    if clip.latents is not None and not clip.request.save_latents:
        try:
            clip.latents.unlink(missing_ok=True)
        except OSError as error:
            run.reporter.warn(f"{clip.latents} is not needed any more, but stays: {error}")


STAGES: Mapping[str, Callable[[Run], None]] = MappingProxyType(
    {"text": encode_texts, "draft": make_drafts, "highres": make_highres, "decode": decode_clips}
)


def notify(run: Run, clips: Iterable[Clip], text: str) -> None:
    """Say something once and keep it for the receipts of `clips`."""
    clips = tuple(clips)
    for clip in clips:
        clip.notices.append(text)
    who = f"prompt {clips[0].prompt.id}: " if len(clips) == 1 else ""
    run.reporter.warn(who + text)
