# SPDX-License-Identifier: Apache-2.0
"""The whole program: prompt -> text -> draft -> condition -> highres -> decode -> write.

Stages run one after another over all prompts, so that every network is loaded once and only
one transformer is in memory. A prompt that fails does not take the others with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from pw_engines import EngineStore
from pw_kernels.launcher import tally
from pw_kernels.op import using
from pw_runtime.bundle import Bundle, verify
from pw_runtime.clip import Clip, keep_thumbs, start_clip, write_clip_receipt, write_latents
from pw_runtime.contact_sheet import write_contact_sheet
from pw_runtime.decoder_engines import choose_decoder, decoder_on
from pw_runtime.engines import OnEngines, build_command, choose_engines
from pw_runtime.faults import others_go_on, require_finite
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
from pw_runtime.stages.write import pixel_format_for, suffix, write_video
from pw_runtime.trace import Stopwatch
from pw_runtime.types import (
    DecodePlan,
    Latent,
    Network,
    Outcome,
    Request,
    StageName,
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
    engines: dict[Network, OnEngines] = field(default_factory=dict)


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
        KeyboardInterrupt: finished clips are on disk, the unfinished one left no file.
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
    clips = tuple(start_clip(request, prompt, noise) for prompt in request.prompts)
    run = Run(request, bundle, clips, Stopwatch(request.device), reporter)
    run.engines.update({stage: pick_engines(run, stage) for stage in request.stages})
    run.engines["vae"] = choose_decoder(request, bundle, reporter.say)
    if noise and len(clips) > 1:
        notify(run, clips, f"every prompt of this run starts from the noise in {request.noise}")
    with (
        torch.inference_mode(),
        using(request.kernels, attention=request.attention_kernel),
    ):
        encode_texts(run)
        make_drafts(run)
        finish_clips(run)
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
        with (
            others_go_on(clip, reporter),
            reporter.steps(f"draft {clip.prompt.id}", plan.steps) as advance,
            clip.watch.stage("draft"),
        ):
            latent = draft(clip.text, clip.noise_for("draft"), plan, compat, net, advance)
            clip.draft = require_finite(latent, "draft")


def pick_engines(run: Run, stage: StageName) -> OnEngines:
    """What a network will run on; said once. Raises BadRequest."""
    request, config = run.request, require_dit(run.bundle, stage)
    segments = segments_of(config, request.precision, request.chunk)
    command = build_command(request, run.bundle.root)
    # Engines have kernels of their own: with ours asked for, the segments run.
    policy = "eager" if request.kernels == "triton" else request.policy
    choice = choose_engines(segments, policy, EngineStore(), request.device, command)
    if choice.backend != "eager":
        run.reporter.say(f"the {stage} network runs on {choice.reason} ({choice.backend})")
    elif policy == "auto":
        run.reporter.say(
            f"the {stage} network runs without engines ({choice.reason}); `{command}` makes them"
        )
    return OnEngines(segments, choice)


def load_transformer(run: Run, stage: StageName) -> SegmentedDiT:
    """A network's weights, on the engines picked for it."""
    request, picked = run.request, run.engines[stage]
    net = load_dit(run.bundle, stage, request.precision, request.device)
    return SegmentedDiT(net, picked.segments, picked.choice.engines)


def finish_clips(run: Run) -> None:
    """Draft latents -> high-res latents -> files, one prompt after the other."""
    request, compat, reporter = run.request, run.request.preset.compat, run.reporter
    plan, net = request.stages.get("highres"), None
    with run.loading.stage("load"):
        vae = load_decoder(run.bundle, request.device)
        if plan is not None:
            net = load_transformer(run, "highres")
    for clip in run.clips:
        if clip.text is None or clip.draft is None:
            continue
        with others_go_on(clip, reporter):
            if plan is not None and net is not None:
                with clip.watch.stage("condition"):
                    conditioning = condition(clip.draft, plan)
                    noise = clip.noise_for("highres")
                with (
                    reporter.steps(f"highres {clip.prompt.id}", plan.steps) as advance,
                    clip.watch.stage("highres"),
                ):
                    latent = highres(clip.text, conditioning, noise, plan, compat, net, advance)
                    clip.highres = require_finite(latent, "high-res")
            if request.save_latents:
                write_latents(clip)
            write_clip(run, clip, vae)
        clip.forget_tensors()


def write_clip(run: Run, clip: Clip, vae: VaeDecoder) -> None:
    """The clip's last latent -> frames -> video file and receipt."""
    request, preset, watch = run.request, run.request.preset, clip.watch
    stage, plan = list(request.stages.items())[-1]
    latent = clip.draft if stage == "draft" else clip.highres
    assert latent is not None
    painter = decoder_on(vae, run.engines["vae"])
    # The draft of a high-res preset is small enough to be decoded in one piece.
    cut = preset.decode if stage == "highres" or preset.highres is None else DecodePlan()
    if request.contact_sheet and stage == "highres":
        preview_draft(clip, vae)
    pixels = pixel_format_for(request.codec, preset.compat)
    with run.reporter.steps(f"decode {clip.prompt.id}", preset.video.frames) as advance:
        chunks = watch.each("decode", decode(latent, cut, preset.compat, painter, pixels))
        if request.contact_sheet:
            chunks = keep_thumbs(clip, stage, chunks)
        path = clip.path(suffix(request.codec))
        with watch.stage("write"):
            size = write_video(
                count_frames(chunks, advance),
                path,
                width=plan.width,
                height=plan.height,
                frames=preset.video.frames,
                fps=preset.video.fps,
                codec=request.codec,
            )
    clip.video = path
    write_clip_receipt(clip, run.bundle, run.engines, run.loading.seconds["load"], size)
    run.reporter.finished(path)


def preview_draft(clip: Clip, vae: VaeDecoder) -> None:
    """Decode the draft for the contact sheet alone."""
    latent: Latent | None = clip.draft
    assert latent is not None
    with clip.watch.stage("preview"):
        chunks = decode(latent, DecodePlan(), clip.request.preset.compat, vae)
        for _ in keep_thumbs(clip, "draft", chunks):
            pass


def notify(run: Run, clips: Iterable[Clip], text: str) -> None:
    """Say something once and keep it for the receipts of `clips`."""
    clips = tuple(clips)
    for clip in clips:
        clip.notices.append(text)
    who = f"prompt {clips[0].prompt.id}: " if len(clips) == 1 else ""
    run.reporter.warn(who + text)
