# SPDX-License-Identifier: Apache-2.0
"""The whole program: prompt -> text -> draft -> condition -> highres -> decode -> write.

Each stage runs over all prompts before the next begins, so every network is loaded once and only
one is in memory. Before anything is decoded, all latents are on the disk. A prompt that fails does
not affect the others, and a stage that runs out of memory retries with a smaller plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.job.clip import Clip
from pw_runtime.job.preflight import prepare
from pw_runtime.job.run import Run
from pw_runtime.job.thumbnails import Thumbnails
from pw_runtime.models import VaeDecoder
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.stages.codecs import pixel_format_for
from pw_runtime.stages.condition import resize_draft
from pw_runtime.stages.decode import decode_frames
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.stages.highres import denoise_highres
from pw_runtime.stages.text import encode_text
from pw_runtime.stages.write import encoded_video
from pw_runtime.system.progress import Reporter
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.step import Step
from pw_runtime.types import Outcome, Request, TextContext


def generate(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    ranks: Ranks | None = None,
    *,
    warm: WarmNetworks | None = None,
) -> tuple[Outcome, ...]:
    """Make a clip of every prompt.

    Args:
        request: what to make.
        bundle: the converted checkpoint.
        reporter: shows progress.
        ranks: that make each clip together, of which this process is the first; None: it alone.
        warm: keeps networks loaded for the next call of a process that makes clips alone, as far as
            memory allows; None keeps none.

    Returns:
        One outcome per prompt, in order.

    Raises:
        BadRequest: the request cannot work; nothing was computed.
        BadWeights: the bundle cannot work; what was computed before is on disk, and was reported.
        WriteFailed: the contact sheet could not be written; all clips are finished.
        RankFailed: a rank died; finished clips and latents are on disk, and were reported.
        KeyboardInterrupt: finished clips and latents are on disk, and were reported.
    """
    assert ranks is None or warm is None, "what several ranks have loaded is not kept"
    with prepare(request, bundle, reporter, ranks, warm) as run:
        for name, stage in STAGES.items():
            run.require_room()
            with run.fallback.track_peak(name):
                stage(run)
    run.write_contact_sheet()
    return run.outcomes()


def encode_prompts(run: Run) -> None:
    """Prompts -> text contexts; the negative prompt is encoded once, what guidance skips never."""
    needed, text_len = run.request.passes, run.bundle.networks.draft.config.text_len
    clips = list(run.unfinished())
    if not clips:
        return
    with run.text_network() as network, run.reporter.steps("text", len(clips)) as advance:
        cond = uncond = None
        if "uncond" in needed:
            step, text = run.shared_step("negative prompt"), run.request.negative
            uncond = network.run(step, encode_text, text, text_len, step.notice_text)
        for clip in clips:
            with run.step(clip, "text") as step:
                if "cond" in needed:
                    text = clip.prompt.text
                    cond = network.run(step, encode_text, text, text_len, step.notice_text)
                clip.text = TextContext(cond=cond, uncond=uncond)
            advance()


def denoise_drafts(run: Run) -> None:
    """Text contexts -> draft latents."""
    config, compat = run.request.preset.draft, run.request.preset.compat
    step_cache = run.request.options.step_cache
    with run.transformer("draft") as transformer:
        for clip, text in run.clips_with_text():
            with run.step(clip, "draft", config.steps) as step:
                inputs = (text, clip.noise_for("draft"), config, compat)
                cache = (step_cache, step.notice_approximation)
                latent = transformer.run(step, denoise_draft, *inputs, step.advance, *cache)
                clip.draft = latent.on_host()
                del latent  # the clip alone decides how long it is kept
                run.save_latents(clip)


def denoise_highres_clips(run: Run) -> None:
    """Draft latents -> high-res latents."""
    config, compat = run.request.stages.get("highres"), run.request.preset.compat
    if config is None:
        return
    reuse = run.request.options.guidance_reuse
    with run.transformer("highres") as transformer:
        for clip, text in run.clips_with_draft():
            with run.step(clip, "highres", config.steps) as step:
                with clip.stopwatch.stage("condition"):
                    conditioning = resize_draft(clip.latent_of("draft"), config)
                    noise = clip.noise_for("highres")
                inputs = (text, conditioning, noise, config, compat)
                latent = transformer.run(step, denoise_highres, *inputs, step.advance, reuse)
                clip.highres = latent
                del latent
                run.save_latents(clip)


def decode_clips(run: Run) -> None:
    """Latents -> video files and receipts. `pw decode` is this stage alone."""
    frames = run.request.preset.video.frames
    with run.decoder() as decoder:
        for clip in run.unfinished():
            with run.step(clip, "decode", frames, timed=False) as step:
                if clip.latents is not None:  # else the disk is its last chance
                    run.require_room()
                decoder.run(step, decode_clip, run, clip, step)
                run.finish(clip)


def decode_clip(vae: VaeDecoder, run: Run, clip: Clip, step: Step) -> None:
    """Decode one clip's last latent into its video file, which appears after its receipt."""
    preset, stage, codec = clip.request.preset, clip.last_stage, clip.request.options.codec
    config, tiling = clip.request.stages[stage], run.fallback.plan.decode.tiling
    thumbnails = Thumbnails(clip, vae)
    with clip.stopwatch.stage("latents"):
        latent = clip.latent_of(stage)
    pixels = pixel_format_for(codec, preset.compat)
    store = run.tile_store(clip, latent, pixels)
    decode = partial(
        decode_frames,
        *(run.decoder_on(vae), latent, tiling, preset.compat, pixels),
        store=store,
        advance=step.advance,
    )
    frames = run.shared_decode(decode, latent, pixels)
    chunks = thumbnails.collect(stage, clip.stopwatch.time_items("decode", frames))
    if clip.partial_video is not None:
        run.reporter.say(f"{clip.partial_video} can be watched while it is encoded")
    with ExitStack() as publishing:
        if store is not None:
            publishing.callback(store.close)
        publishing.callback(frames.close)
        with clip.stopwatch.stage("write"):
            video = encoded_video(
                chunks,
                clip.target,
                width=config.width,
                height=config.height,
                frames=preset.video.frames,
                fps=preset.video.fps,
                codec=codec,
                partial_video=clip.partial_video,
            )
            video_bytes = publishing.enter_context(video)
        run.write_receipt(clip, video_bytes)
    clip.filmstrips = tuple(thumbnails.filmstrips)


STAGES: Mapping[str, Callable[[Run], None]] = MappingProxyType(
    {
        "text": encode_prompts,
        "draft": denoise_drafts,
        "highres": denoise_highres_clips,
        "decode": decode_clips,
    }
)
