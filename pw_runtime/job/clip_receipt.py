# SPDX-License-Identifier: Apache-2.0
"""The receipt of a finished clip, from its state and the plan of its run."""

from __future__ import annotations

from dataclasses import asdict, replace

from pw_runtime.checkpoint.bundle import sha256_of
from pw_runtime.job.clip import Clip
from pw_runtime.job.receipt import Receipt, kernel_launches, machine, versions, write_receipt
from pw_runtime.planning.exactness import exactness
from pw_runtime.planning.oom_fallback import OomFallback
from pw_runtime.stages.write import VideoFile
from pw_runtime.types import Prompt


def _kept_latents(clip: Clip) -> dict[str, str | int] | None:
    """Describe the latents file that stays beside the clip, or elsewhere; None where none does."""
    if clip.latents is None or not clip.keeps_latents:
        return None
    beside = clip.latents.parent.resolve() == clip.request.out.resolve()
    return {
        "file": clip.latents.name if beside else str(clip.latents.resolve()),
        "bytes": clip.latents.stat().st_size,
        "sha256": sha256_of(clip.latents),
    }


def _recorded_prompt(prompt: Prompt) -> dict[str, str | int]:
    """Return a prompt as receipts have it, with the paths of what it starts from."""
    recorded: dict[str, str | int]
    recorded = {"text": prompt.text, "id": prompt.id, "position": prompt.position}
    return recorded | {kind: str(path) for kind, path in prompt.sources.items()}


def write_clip_receipt(clip: Clip, loading: float, video: VideoFile, fallback: OomFallback) -> None:
    """Write `<id>.json` for a finished clip. Raises WriteFailed.

    For a clip finished from its latents, fields that only the earlier run could fill are absent.

    Args:
        clip: the clip.
        loading: seconds that loading the networks took.
        video: the complete video file.
        fallback: the plan of the run.
    """
    provenance, options = clip.provenance, clip.request.options
    seconds = {name: round(value, 4) for name, value in clip.stopwatch.seconds.items()}
    peaks, launches, plan = fallback.peaks(), kernel_launches(), fallback.memory_report()
    finished = None
    if clip.resumed:
        assert clip.latents is not None
        finished = {
            "latents": clip.latents.name,
            "codec": options.codec,
            "device": options.device,
            "kernels": options.kernels,
            "conv": options.conv,
            "vae_precision": options.vae_precision,
            "load_seconds": round(loading, 4),
            "peak_memory_bytes": peaks,
            "plan": plan,
            "kernel_launches": launches,
            "versions": versions(),
            "machine": machine(clip.request.device),
        }
    else:
        seconds = {"load_all_networks": round(loading, 4), **seconds}
    # The transformers ran as the provenance says, the decoder as this run has it.
    ran = replace(provenance.options, vae_precision=options.vae_precision, conv=options.conv)
    # The planner may have given a stage fewer tokens in a call than were asked for.
    ways = [replace(ran, chunk=chunk) for chunk in sorted(clip.chunks or {ran.chunk})]
    backends = {network: entry["backend"] for network, entry in provenance.engines.items()}
    receipt = Receipt(
        prompt=_recorded_prompt(provenance.prompt),
        negative=provenance.negative,
        seeds=provenance.seeds,
        noise=provenance.noise,
        noise_file=provenance.noise_file,
        preset=asdict(provenance.preset),
        passes={
            name: list(config.passes)
            for name, config in clip.request.computed_for(provenance.prompt).items()
        },
        options=asdict(provenance.options),
        exactness=asdict(exactness(backends, *ways, replace(ways[0], kernels=options.kernels))),
        bundle=provenance.bundle,
        video={"file": clip.target.name, **asdict(video)},
        latents=_kept_latents(clip),
        tiling=asdict(fallback.plan.decode.tiling),
        seconds=seconds,
        engines=provenance.engines,
        notices=[notice.text for notice in clip.notices],
        fallbacks=[notice.text for notice in clip.notices if notice.kind == "fallback"],
        versions=provenance.versions,
        machine=provenance.machine,
        peak_memory_bytes=None if finished else peaks,
        plan=None if finished else plan,
        kernel_launches=None if finished else launches,
        sources={kind: asdict(source) for kind, source in provenance.sources.items()} or None,
        loras={
            network: [asdict(lora) for lora in loras] for network, loras in provenance.loras.items()
        }
        or None,
        finished_from_latents=finished,
    )
    write_receipt(receipt, clip.path(".json"))
