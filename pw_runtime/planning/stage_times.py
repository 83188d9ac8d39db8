# SPDX-License-Identifier: Apache-2.0
"""Time of each stage of a workload, and the bytes that its ranks send to each other."""

from __future__ import annotations

from dataclasses import dataclass

from pw_runtime.execution.decoder_segments import decode_strips
from pw_runtime.execution.division import StepTraffic, run_of, step_traffic
from pw_runtime.execution.sparse_stage import kept_fraction
from pw_runtime.models.tiling import make_bands
from pw_runtime.planning.decode_choices import decode_traffic
from pw_runtime.planning.decode_layers import SEAMS, PeakCounter
from pw_runtime.planning.decode_memory import busiest_share, waiting_sizes
from pw_runtime.planning.encode_memory import encode_flop
from pw_runtime.planning.time_estimate import Rates, decode_seconds, denoise_seconds
from pw_runtime.planning.transformer_memory import stage_slices, weight_bytes
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import DecodePlan, RunPlan, StageConfig, StageName, TransformerPlan

# Latent frames by which a rank of a divided decode is behind the one before it: the rows that it
# needs are there when that one has computed its largest block.
RANK_LAG = 0.11
PROMPT_TOKENS = 128  # of a text, roughly: it costs little beside anything else


def seconds_by_stage(work: Workload, plan: RunPlan, rates: Rates) -> dict[str, float]:
    """Estimate the seconds of one clip, by stage; of text and sources, nothing is known."""
    times: dict[str, float] = {
        name: transformer_seconds(work, name, chosen, rates)
        for name, chosen in plan.transformers.items()
    }
    copied = 0 if plan.budget.device is None else decode_traffic(work, plan.decode)
    return times | {"decode": _decode_seconds(work, plan.decode, rates, copied)}


def expected_seconds(work: Workload, plan: RunPlan) -> dict[str, float]:
    """Estimate one clip's seconds by stage, for their ratios: rates and decode are approximate.

    Unlike `seconds_by_stage` it runs nothing, also not on meta tensors, and it has the text.
    """
    text, rates = work.text_encoder, work.rates
    weights = text.num_layers * text.dim * (4 * text.attention_dim + 3 * text.ffn_dim)
    times: dict[str, float] = {}
    if plan.text is not None:
        times["text"] = 2 * PROMPT_TOKENS * weights / rates.matmul
    if plan.encode is not None:
        flop = sum(_encode_flop(work, stage) for stage in work.encoded)
        times["encode"] = flop / rates.conv
    for name, chosen in plan.transformers.items():
        times[name] = transformer_seconds(work, name, chosen, rates)
    _, frames, rows, columns = latent_shape(_last(work), work.preset.video)
    frame = PeakCounter(work.vae, 4)
    frame.global_part(rows, columns)
    frame.local_part([rows], 0, columns)
    return times | {"decode": frames * frame.flop / plan.decode.ranks / rates.conv}


def transformer_seconds(
    work: Workload, name: StageName, plan: TransformerPlan, rates: Rates
) -> float:
    """Estimate the seconds of a denoising stage of one clip, with all steps of the draft."""
    config, precision = work.transformers[name], work.options.compute_precision
    sizes = weight_bytes(config, precision, work.options.linear)
    streamed = {"resident": 0, "gathered": config.num_layers * sizes.slots}
    stage, left_out = work.stages[name], 0.0  # passes
    if name == "highres":
        left_out = work.options.guidance_reuse / (2 * stage.steps)
    return (1 - left_out) * denoise_seconds(
        *(config, stage, work.preset.video, plan, rates),
        streamed=streamed.get(plan.weights, sizes.blocks),
        itemsize=4 if precision == "fp32" else 2,
        keep=kept_fraction(work.options, name),
    )


def transformer_traffic(work: Workload, name: StageName, plan: TransformerPlan) -> StepTraffic:
    """Count the bytes that the ranks of a denoising stage send in one step."""
    config, precision = work.transformers[name], work.options.compute_precision
    stage, slot = work.stages[name], weight_bytes(config, precision, work.options.linear).slots
    sizes = stage_slices(stage, work.preset.video, plan.chunk, padded=work.padded)
    padding = sum(sizes) - stage.tokens(work.preset.video)  # is not sent
    return step_traffic(
        config,
        plan.split,
        (*sizes[:-1], sizes[-1] - padding),
        passes=len(stage.passes),
        itemsize=4 if precision == "fp32" else 2,
        block_bytes=config.num_layers * slot if plan.weights == "gathered" else 0,
        share_attention=plan.share_attention,
    )


@dataclass(frozen=True, slots=True)
class DecodeTraffic:
    """Bytes that the ranks of a decode send in a clip."""

    border: int  # rows that one rank hands to the next
    borders: int
    pixels: int  # packed frames, to the first rank
    latents: int  # to each further rank

    @property
    def total(self) -> int:
        """All of them."""
        return self.border * self.borders + self.pixels + self.latents


def traffic_of_decode(work: Workload, plan: DecodePlan) -> DecodeTraffic:
    """Count the bytes that the ranks of a decode send in one clip."""
    further = plan.ranks - 1
    if not further:
        return DecodeTraffic(0, 0, 0, 0)
    last = _last(work)
    _, frames, rows, columns = shape = latent_shape(last, work.preset.video)
    border = 0
    if not plan.engines:
        bands = [band.stop - band.start for band in make_bands(rows, plan.tiling.strips, work.vae)]
        itemsize = 4 if work.options.vae_precision == "fp32" else 2
        border = sum(waiting_sizes(work.vae, frames, rows, columns, bands, itemsize)[SEAMS])
    pixels = work.preset.video.frames * work.frame_bytes
    latent = 4 * shape[0] * frames * rows * columns
    return DecodeTraffic(border, further, pixels * further // plan.ranks, latent * further)


def _decode_seconds(work: Workload, plan: DecodePlan, rates: Rates, copied: int) -> float:
    """Estimate the seconds of a decode, which `copied` bytes cross to the host and back."""
    last, traffic = _last(work), traffic_of_decode(work, plan)
    share: float = 1
    if plan.ranks > 1:
        _, _, rows, columns = latent_shape(last, work.preset.video)
        if plan.engines:
            widths = [s.last - s.first for s in decode_strips(work.vae, plan.tiling, columns)]
            runs = (run_of(len(widths), plan.ranks, rank) for rank in range(plan.ranks))
            share = max(sum(widths[run.start : run.stop]) for run in runs) / columns
        else:
            share = busiest_share(work.vae, rows, columns, plan.tiling.strips, plan.ranks)
    return decode_seconds(
        *(work.vae, last, work.preset.video, rates, copied),
        share=share,
        waited=0 if plan.engines else RANK_LAG * (plan.ranks - 1),
        sent=traffic.border + traffic.pixels + traffic.latents,
    )


def _encode_flop(work: Workload, stage: StageConfig) -> float:
    """Return the arithmetic of encoding a clip, or a picture."""
    frames = work.preset.video.frames if work.video else 1
    return encode_flop(work.vae, width=stage.width, height=stage.height, frames=frames)


def _last(work: Workload) -> StageConfig:
    """Return the stage whose latent is decoded."""
    return list(work.stages.values())[-1]
