# SPDX-License-Identifier: Apache-2.0
"""The whole program: prompt -> text -> draft -> condition -> highres -> decode -> write.

Each stage runs over all prompts before the next begins, so that every network is loaded once
and only one is in memory. Before anything is decoded, all latents are on the disk. A prompt that
fails does not take the others with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from pw_engines import EngineStore
from pw_kernels.launcher import tally
from pw_kernels.op import using
from pw_runtime.bundle import Bundle, verify
from pw_runtime.clip import Clip, keep_thumbs, save_latents, start_clip, write_clip_receipt
from pw_runtime.contact_sheet import Filmstrip, write_contact_sheet
from pw_runtime.decoder_engines import choose_decoder, decoder_on
from pw_runtime.engines import OnEngines, build_command, choose_engines
from pw_runtime.errors import WriteFailed
from pw_runtime.faults import end_of_run_tells, others_go_on, require_finite
from pw_runtime.models import VaeDecoder
from pw_runtime.networks import (
    check_networks,
    load_decoder,
    load_dit,
    load_text_network,
    require_dit,
)
from pw_runtime.noise import load_noise
from pw_runtime.progress import Reporter, count_frames
from pw_runtime.receipt import reset_peak_memory
from pw_runtime.request import check_request
from pw_runtime.segmented import SegmentedDiT
from pw_runtime.segments import segments_of
from pw_runtime.stages.condition import condition
from pw_runtime.stages.decode import decode
from pw_runtime.stages.draft import draft
from pw_runtime.stages.highres import highres
from pw_runtime.stages.text import encode_text
from pw_runtime.stages.write import pixel_format_for, write_video
from pw_runtime.trace import Stopwatch
from pw_runtime.types import (
    DecodePlan,
    Network,
    Outcome,
    Request,
    StageName,
    StagePlan,
    TextContext,
)


@dataclass(frozen=True, slots=True)
class Run:
    """What all steps of one run share."""

    request: Request
    bundle: Bundle
    clips: tuple[Clip, ...]
    loading: Stopwatch
    reporter: Reporter
    engines: Mapping[Network, OnEngines] = field(default_factory=dict)


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
    reporter.say(f"checking the files of {bundle.root}")
    check_networks(bundle, request.stages, request.attention_kernel)
    verify(bundle)
    reset_peak_memory(request.device)
    tally.clear()
    engines: dict[Network, OnEngines] = {
        stage: pick_engines(request, bundle, stage, reporter) for stage in request.stages
    }
    engines["vae"] = choose_decoder(request, bundle, reporter.say)
    clips = tuple(start_clip(request, one, noise, bundle, engines) for one in request.prompts)
    run = Run(request, bundle, clips, Stopwatch(request.device), reporter, engines)
    if noise and len(clips) > 1:
        notify(run, clips, f"every prompt of this run starts from the noise in {request.noise}")
    with (
        torch.inference_mode(),
        using(request.kernels, attention=request.attention_kernel),
        end_of_run_tells(clips, reporter),
    ):
        encode_texts(run)
        make_drafts(run)
        make_highres(run)
        decode_clips(run)
    rows = [clip.sheet_row() for clip in clips if clip.video is not None]
    if request.contact_sheet and rows:
        write_contact_sheet(rows, request.out / "contact_sheet.png")
    return tuple(clip.outcome() for clip in clips)


def encode_texts(run: Run) -> None:
    """Prompts -> text contexts; the negative prompt is encoded once."""
    request, bundle, reporter = run.request, run.bundle, run.reporter
    with run.loading.stage("load"):
        net = load_text_network(bundle, request.precision, request.device)
    text_len = bundle.networks.draft.config.text_len
    with reporter.steps("text", len(run.clips)) as advance:
        uncond = encode_text(
            request.negative, net, text_len, lambda cut: notify(run, run.clips, f"negative {cut}")
        )
        for clip in run.clips:
            with others_go_on(clip, reporter), clip.watch.stage("text"):
                cond = encode_text(clip.prompt.text, net, text_len, partial(notify, run, (clip,)))
                clip.text = TextContext(cond=cond, uncond=uncond)
            advance()


def make_drafts(run: Run) -> None:
    """Text contexts -> draft latents."""
    plan, compat, reporter = run.request.preset.draft, run.request.preset.compat, run.reporter
    with run.loading.stage("load"):
        net = load_transformer(run, "draft")
    for clip in run.clips:
        if clip.text is None:
            continue
        with others_go_on(clip, reporter):
            with (
                reporter.steps(f"draft {clip.prompt.id}", plan.steps) as advance,
                clip.watch.stage("draft"),
            ):
                latent = draft(clip.text, clip.noise_for("draft"), plan, compat, net, advance)
                clip.draft = require_finite(latent, "draft")
            if clip.last_stage == "draft":
                put_aside(run, clip)


def pick_engines(
    request: Request, bundle: Bundle, stage: StageName, reporter: Reporter
) -> OnEngines:
    """What a network will run on; said once. Raises BadRequest."""
    config = require_dit(bundle, stage)
    segments = segments_of(config, request.precision, request.chunk)
    command = build_command(request, bundle.root)
    # Engines have kernels of their own: with ours asked for, the segments run.
    policy = "eager" if request.kernels == "triton" else request.policy
    choice = choose_engines(segments, policy, EngineStore(), request.device, command)
    if choice.backend != "eager":
        reporter.say(f"the {stage} network runs on {choice.reason} ({choice.backend})")
    elif policy == "auto":
        reporter.say(
            f"the {stage} network runs without engines ({choice.reason}); `{command}` makes them"
        )
    return OnEngines(segments, choice)


def load_transformer(run: Run, stage: StageName) -> SegmentedDiT:
    """A network's weights, on the engines picked for it."""
    request, picked = run.request, run.engines[stage]
    net = load_dit(run.bundle, stage, request.precision, request.device)
    return SegmentedDiT(net, picked.segments, picked.choice.engines)


def make_highres(run: Run) -> None:
    """Draft latents -> high-res latents; the transformer is let go at the end."""
    plan = run.request.stages.get("highres")
    waiting = [clip for clip in run.clips if clip.draft is not None]
    if plan is None or not waiting:
        return
    with run.loading.stage("load"):
        net = load_transformer(run, "highres")
    for clip in waiting:
        with others_go_on(clip, run.reporter):
            paint_clip(run, clip, plan, net)
            put_aside(run, clip)
        if clip.error is not None:
            clip.forget_tensors()


def paint_clip(run: Run, clip: Clip, plan: StagePlan, net: SegmentedDiT) -> None:
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


def put_aside(run: Run, clip: Clip) -> None:
    """The clip's tensors go to the disk, where they wait for the decode."""
    try:
        with clip.watch.stage("latents"):
            save_latents(clip)
    except WriteFailed as error:  # better a clip without that than none
        notify(run, (clip,), f"its latents stay in memory until they are decoded: {error}")
    else:
        clip.forget_tensors()


def decode_clips(run: Run) -> None:
    """Latents files -> video files and receipts. `pw decode` is this alone."""
    waiting = [clip for clip in run.clips if clip.error is None]
    if not waiting:
        return
    with run.loading.stage("load"):
        vae = load_decoder(run.bundle, run.request.device)
    for clip in waiting:
        with others_go_on(clip, run.reporter):
            finish_clip(run, clip, decode_clip(run, clip, vae))
        clip.forget_tensors()


def decode_clip(run: Run, clip: Clip, vae: VaeDecoder) -> int:
    """One clip's last latent -> its video file, whose bytes are returned. After an exception the
    clip is as before and the file is not there."""
    request, preset, watch = clip.request, clip.request.preset, clip.watch
    stage, plan = clip.last_stage, clip.request.stages[clip.last_stage]
    with watch.stage("latents"):
        latent = clip.latent_of(stage)
    # The draft of a high-res preset is small enough to be decoded in one piece.
    cut = preset.decode if stage == "highres" or preset.highres is None else DecodePlan()
    on_engines = decoder_on(vae, run.engines["vae"])
    strips: list[Filmstrip] = []
    if request.contact_sheet and stage == "highres":
        preview_draft(clip, vae, strips)
    if clip.growing is not None:
        run.reporter.say(f"{clip.growing} can be watched while it grows")
    pixels = pixel_format_for(request.codec, preset.compat)
    with run.reporter.steps(f"decode {clip.prompt.id}", preset.video.frames) as advance:
        chunks = watch.each("decode", decode(latent, cut, preset.compat, on_engines, pixels))
        if request.contact_sheet:
            chunks = keep_thumbs(clip, stage, chunks, strips)
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
        chunks = decode(clip.latent_of("draft"), DecodePlan(), clip.request.preset.compat, vae)
        for _ in keep_thumbs(clip, "draft", chunks, strips):
            pass


def finish_clip(run: Run, clip: Clip, video_bytes: int) -> None:
    """The video is there: write the receipt, and remove the latents file that nobody asked for."""
    write_clip_receipt(clip, run.loading.seconds["load"], video_bytes)
    clip.video = clip.target
    run.reporter.finished(clip.video)
    if clip.latents is not None and not clip.request.save_latents:
        try:
            clip.latents.unlink(missing_ok=True)
        except OSError as error:
            run.reporter.warn(f"{clip.latents} is not needed any more, but stays: {error}")


def notify(run: Run, clips: Iterable[Clip], text: str) -> None:
    """Say something once and keep it for the receipts of `clips`."""
    clips = tuple(clips)
    for clip in clips:
        clip.notices.append(text)
    who = f"prompt {clips[0].prompt.id}: " if len(clips) == 1 else ""
    run.reporter.warn(who + text)
