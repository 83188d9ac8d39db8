# SPDX-License-Identifier: Apache-2.0
"""The whole program: prompt -> text -> encode -> draft -> condition -> highres -> decode -> write.

Each stage runs over all prompts before the next begins, so every network is loaded once and only
one is in memory. Before anything is decoded, all latents are on the disk. A prompt that fails does
not affect the others, and a stage that runs out of memory retries with a smaller plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.job import networks
from pw_runtime.job.clip import Clip
from pw_runtime.job.preflight import prepare
from pw_runtime.job.run import Run
from pw_runtime.job.sources import require_unchanged_video, unchanged_picture
from pw_runtime.job.thumbnails import Thumbnails
from pw_runtime.job.video_tags import video_tags
from pw_runtime.models import VaeDecoder, VaeEncoder
from pw_runtime.planning.oom_fallback import LazyNetwork
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.stages.codecs import pixel_format_for
from pw_runtime.stages.condition import resize_draft
from pw_runtime.stages.decode import decode_frames
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.stages.encode import encode_picture, encode_video
from pw_runtime.stages.highres import denoise_highres
from pw_runtime.stages.text import encode_text
from pw_runtime.stages.write import encoded_video
from pw_runtime.system.picture_input import crop_notes, fit_picture
from pw_runtime.system.progress import Reporter
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.step import Step
from pw_runtime.system.stop import StopRequest
from pw_runtime.system.video_source import SourceVideo, video_chunks
from pw_runtime.types import FrameChunk, Outcome, PixelFormat, Request, TextContext


def generate(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    ranks: Ranks | None = None,
    *,
    warm: WarmNetworks | None = None,
    stop: StopRequest | None = None,
    stages: Mapping[str, Callable[[Run], None]] | None = None,
) -> tuple[Outcome, ...]:
    """Make a clip of every prompt.

    Args:
        request: what to make.
        bundle: the converted checkpoint.
        reporter: shows progress.
        ranks: that make each clip together, of which this process is the first; None: it alone.
        warm: keeps networks loaded for the next call of a process that makes clips alone, as far as
            memory allows; None keeps none.
        stop: with which another thread or a signal handler asks the run to stop.
        stages: in place of `STAGES`, by their names: where latents or frames come from elsewhere,
            or go elsewhere than into files.

    Returns:
        One outcome per prompt, in order.

    Raises:
        BadRequest: the request cannot work; nothing was computed.
        BadWeights: the bundle cannot work; what was computed before is on disk, and was reported.
        WriteFailed: the contact sheet could not be written; all clips are finished.
        RankFailed: a rank died; finished clips and latents are on disk, and were reported.
        KeyboardInterrupt, Stopped: finished clips and latents are on disk, and were reported.
    """
    assert ranks is None or warm is None, "what several ranks have loaded is not kept"
    with prepare(request, bundle, reporter, ranks, warm, stop) as run:
        for name, stage in (stages or STAGES).items():
            run.require_room()
            with run.fallback.track_peak(name):
                stage(run)
    run.write_contact_sheet()
    return run.outcomes()


def encode_prompts(run: Run) -> None:
    """Prompts -> text contexts; the negative prompt is encoded once, what guidance skips never."""
    needed, text_len = run.request.passes, run.bundle.networks.draft.config.text_len
    clips = [clip for clip in run.unfinished() if clip.needs == "text"]
    if not clips:
        return
    with networks.text_network(run) as network, run.reporter.steps("text", len(clips)) as advance:
        cond = uncond = None
        if "uncond" in needed:
            step, text = run.shared_step("negative prompt", clips), run.request.negative
            uncond = network.run(step, encode_text, text, text_len, step.notice_text)
        for clip in clips:
            with run.step(clip, "text") as step:
                if "cond" in needed:
                    text = clip.prompt.text
                    cond = network.run(step, encode_text, text, text_len, step.notice_text)
                clip.text = TextContext(cond=cond, uncond=uncond)
                run.keep_text(clip)
            advance()


def encode_sources(run: Run) -> None:
    """Pictures -> first latent frames; videos -> drafts, or what drafts begin with."""
    clips = [clip for clip in run.unfinished() if clip.needs == "encode"]
    if not clips:
        return
    with networks.encoder(run) as encoder:
        for clip in clips:
            if clip.video_source is not None:
                encode_draft_video(run, encoder, clip, clip.video_source)
                continue
            with run.step(clip, "encode") as step:
                assert clip.prompt.image is not None
                picture = unchanged_picture(clip.prompt.image, clip.provenance.sources["image"])
                last = clip.request.stages[clip.last_stage]
                for note in (*picture.notes, *crop_notes(picture, last.width, last.height)):
                    step.notice_source(f"the picture was {note}")
                for stage in clip.request.encoded(clip.prompt):
                    config = clip.request.stages[stage]
                    pixels = fit_picture(picture, config.width, config.height)
                    encode = networks.encoding(run, encode_picture)
                    clip.fixed[stage] = encoder.run(step, encode, pixels)


def encode_draft_video(
    run: Run, encoder: LazyNetwork[VaeEncoder], clip: Clip, source: SourceVideo
) -> None:
    """Encode the video of a clip: its draft, or what that begins with."""
    config = clip.request.stages["draft"]
    frames = latent_shape(config, clip.request.preset.video)[1]
    with run.step(clip, "encode", frames) as step:
        require_unchanged_video(clip)
        chunks = partial(video_chunks, source, config.width, config.height)
        encode = networks.encoding(run, encode_video)
        latent = encoder.run(step, encode, chunks, step.advance)
        if clip.request.options.draft_strength:
            clip.begun = latent
        else:
            clip.draft = latent
            run.save_latents(clip)


def denoise_drafts(run: Run) -> None:
    """Text contexts -> draft latents."""
    config, compat = run.request.preset.draft, run.request.preset.compat
    with networks.transformer(run, "draft") as transformer:
        for clip, text in run.clips_for("draft"):
            with run.step(clip, "draft", clip.draft_steps) as step:
                inputs = (text, clip.noise_for("draft"), config, compat)
                step_cache = clip.provenance.options.step_cache
                steps = (step.advance, step_cache, step.notice_approximation)
                log = run.step_log(clip, "draft", step)
                latent = transformer.run(
                    step,
                    denoise_draft,
                    *(*inputs, *steps, log),
                    fixed=clip.fixed_for("draft"),
                    begun=clip.begun,
                    strength=run.request.options.draft_strength,
                )
                clip.begun = None
                clip.chunks.add(run.fallback.plan.transformers["draft"].chunk)
                clip.draft = latent.on_host()
                del latent  # the clip alone decides how long it is kept
                run.save_latents(clip)


def denoise_highres_clips(run: Run) -> None:
    """Draft latents -> high-res latents."""
    config, compat = run.request.stages.get("highres"), run.request.preset.compat
    if config is None:
        return
    reuse = run.request.options.guidance_reuse
    with networks.transformer(run, "highres") as transformer:
        for clip, text in run.clips_for("highres"):
            with run.step(clip, "highres", config.steps) as step:
                with clip.stopwatch.stage("condition"):
                    conditioning = resize_draft(clip.latent_of("draft"), config)
                    noise = clip.noise_for("highres")
                inputs = (text, conditioning, noise, config, compat)
                steps = (step.advance, reuse, run.step_log(clip, "highres", step))
                fixed = clip.fixed_for("highres")
                latent = transformer.run(step, denoise_highres, *inputs, *steps, fixed)
                clip.chunks.add(run.fallback.plan.transformers["highres"].chunk)
                clip.highres = latent
                del latent
                run.save_latents(clip)


def decode_clips(run: Run) -> None:
    """Latents -> video files and receipts. `pw decode` is this stage alone."""
    frames = run.request.preset.video.frames
    with networks.decoder(run) as decoder:
        for clip in run.unfinished():
            with run.step(clip, "decode", frames, timed=False) as step:
                if clip.latents is not None:  # else the disk is its last chance
                    run.require_room()
                decoder.run(step, decode_clip, run, clip, step)
                run.finish(clip)


def decode_clip(vae: VaeDecoder, run: Run, clip: Clip, step: Step) -> None:
    """Decode one clip's last latent into its video file, which appears after its receipt."""
    preset, stage, codec = clip.request.preset, clip.last_stage, clip.request.options.codec
    config = clip.request.stages[stage]
    thumbnails = Thumbnails(clip, vae)
    if clip.partial_video is not None:
        run.reporter.say(f"{clip.partial_video} can be watched while it is encoded")
    pixels = pixel_format_for(codec, preset.compat)
    with decoding(vae, run, clip, step, pixels) as frames, ExitStack() as publishing:
        with clip.stopwatch.stage("write"):
            video = encoded_video(
                thumbnails.collect(stage, frames),
                clip.target,
                width=config.width,
                height=config.height,
                frames=preset.video.frames,
                fps=preset.video.fps,
                codec=codec,
                tags=video_tags(clip.provenance),
                partial_video=clip.partial_video,
                audio=run.sound_of(clip),
            )
            written = publishing.enter_context(video)
        run.write_receipt(clip, written)
    clip.filmstrips = tuple(thumbnails.filmstrips)


@contextmanager
def decoding(
    vae: VaeDecoder, run: Run, clip: Clip, step: Step, pixels: PixelFormat
) -> Iterator[Iterator[FrameChunk]]:
    """Decode one clip's last latent; yield the frames, to be used up inside the block."""
    with clip.stopwatch.stage("latents"):
        latent = clip.latent_of(clip.last_stage)
    tiling, compat = run.fallback.plan.decode.tiling, clip.request.preset.compat
    store = run.tile_store(clip, latent, pixels)
    decode = partial(
        decode_frames,
        *(run.decoder_on(vae), latent, tiling, compat, pixels),
        store=store,
        log=run.frame_log(clip, latent, pixels, step),
        advance=step.advance,
        skip=step.skip,
    )
    frames = run.shared_decode(decode, latent, pixels)
    with ExitStack() as ending:
        if store is not None:
            ending.callback(store.close)
        ending.callback(frames.close)
        yield clip.stopwatch.time_items("decode", frames)


STAGES: Mapping[str, Callable[[Run], None]] = MappingProxyType(
    {
        "text": encode_prompts,
        "encode": encode_sources,
        "draft": denoise_drafts,
        "highres": denoise_highres_clips,
        "decode": decode_clips,
    }
)
