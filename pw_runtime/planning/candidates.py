# SPDX-License-Identifier: Apache-2.0
"""Candidates of each stage: the ways to run it, the fastest first, and the memory of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from pw_runtime.models import expected_shapes
from pw_runtime.models.tiling import make_strips
from pw_runtime.models.vae import PIXEL_CHANNELS
from pw_runtime.planning.decode_memory import decode_memory
from pw_runtime.planning.engine_decode import engine_decode_memory
from pw_runtime.planning.transformer_memory import stage_memory, text_memory
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import (
    Codec,
    DecodePlan,
    MemoryItem,
    Pass,
    Place,
    Residency,
    StageMemory,
    StageName,
    TilingConfig,
    TransformerPlan,
    VaeConfig,
)

# Bands in which a CPU decodes as fast as in one, in less memory: measured with 1 to 16 of them;
# with two latent rows in each it was 10 % slower.
CPU_BANDS, BAND_ROWS = 4, 8
HEAP_GAPS = 20  # a twentieth of the tensors: 3 to 7 % were measured
LIBRARIES = 80 * 2**20  # measured: code first used by the decode, and oneDNN's own buffers
# Beyond what PyTorch allocates, a process on a GPU needs memory for its code, for cuBLAS and cuDNN
# and for gaps between allocations. An estimate: not measured by this project.
DEVICE_RESERVE = 2**30
SMALLER_CHUNK = 2048  # tokens per engine call, where the usual chunk does not fit
# Frames of 1.5 bytes a pixel that an encoder holds with the threads of stages/codecs.py: at most
# 84, 123, 182 and 70 were measured at 3840x2144, packets and frames in production included.
ENCODER_FRAMES: Mapping[Codec, int] = MappingProxyType(
    {"h264": 110, "hevc": 150, "av1": 210, "ffv1": 80}
)


Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Choice]):
    """One way to run a stage, and the memory it takes."""

    choice: Choice
    name: str
    memory: StageMemory

    @property
    def weights(self) -> int:
        """Bytes of weights where the stage computes."""
        return sum(item.bytes for item in self.memory.items if item.kind == "weights")


Candidates = Mapping[str, tuple[Candidate[Any], ...]]
"""Stage -> its candidates, the fastest first."""


def candidates(work: Workload, *, gpu: bool, decode_only: bool = False) -> Candidates:
    """List the candidates of every stage of a run, or of the decode alone."""
    stages: dict[str, tuple[Candidate[Any], ...]] = {}
    if not decode_only:
        stages["text"] = text_candidates(work, gpu=gpu)
        stages |= {name: transformer_candidates(work, name, gpu=gpu) for name in work.stages}
    return stages | {"decode": decode_candidates(work, gpu=gpu)}


def text_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[Place], ...]:
    """List the candidates of the text stage: on the GPU, on the CPU."""
    items = text_memory(work.text_encoder, work.options.compute_precision)
    moved = _stage("text", _moved(items, "host"), work)
    options: list[Candidate[Place]] = [Candidate("host", "on the CPU", moved)]
    if gpu:
        on_gpu = _stage("text", items, work, gpu=True)
        options.insert(0, Candidate("device", "on the GPU", on_gpu))
    return tuple(options)


def transformer_candidates(
    work: Workload, name: StageName, *, gpu: bool
) -> tuple[Candidate[TransformerPlan], ...]:
    """List a transformer's candidates.

    Resident weights, then streamed ones; of each with the shared first attention, then without.
    """
    off_device: tuple[Residency, ...] = ("mapped",)
    if gpu and work.stored[name] != work.options.compute_precision:
        # Converted once into host memory; where the precision matches, the files are as good.
        off_device = ("streamed", "mapped")
    full, passes = work.options.chunk, work.stages[name].passes
    chunks = [full] if work.padded else [full, min(full, SMALLER_CHUNK)]
    options = []
    for weights in ("resident", *off_device):
        variants = [(False, chunk) for chunk in dict.fromkeys(chunks)]
        if len(passes) > 1:
            variants.insert(0, (True, full))
        for share, chunk in variants:
            plan = TransformerPlan(weights=weights, share_attention=share, chunk=chunk)
            items = stage_memory(
                work.transformers[name],
                work.stages[name],
                work.preset.video,
                work.options.compute_precision,
                plan,
                padded=work.padded,
                scratch=work.scratch.get(name, 0),
            )
            if not gpu:
                items = _moved(items, "host")
            memory = _stage(name, items, work, gpu=gpu)
            options.append(Candidate(plan, transformer_text(plan, passes), memory))
    return tuple(options)


def transformer_text(plan: TransformerPlan, passes: tuple[Pass, ...]) -> str:
    """Describe how a transformer runs."""
    weights = {
        "resident": "weights resident",
        "streamed": "weights streamed from host memory",
        "mapped": "weights streamed from the bundle's files",
    }[plan.weights]
    share = "first attention shared" if plan.share_attention else "first attention not shared"
    if len(passes) == 1:
        text = "the prompt" if passes == ("cond",) else "the negative prompt"
        share = f"one pass per step, with {text} (guidance {int(passes == ('cond',))})"
    return f"{weights}, {share}, up to {plan.chunk} tokens per call"


def decode_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[DecodePlan], ...]:
    """List the decode's candidates: more and more bands, then past frames on the host.

    Bands change the frames by rounding only.
    """
    options, last = work.options, list(work.stages.values())[-1]
    shape = latent_shape(last, work.preset.video)
    candidates = []
    for plan in _decode_plans(work, shape, gpu=gpu):
        itemsize = 4 if options.vae_precision == "fp32" else 2
        items = _decode_items(work.vae, shape, plan.tiling, itemsize)
        if plan.engines and (scratch := work.scratch.get("vae", 0)):
            weights = (item for item in items if item.kind == "weights" or item.place == "host")
            on_engines = engine_decode_memory(work.vae, plan.tiling, *shape[2:], scratch)
            items = (*weights, *on_engines)
        if not gpu:
            items = (*_moved(items, "host"), *_on_a_cpu(work.vae, items))
        frame = 3 * last.width * last.height // 2
        held = ENCODER_FRAMES[options.codec] * frame
        encoder = _process_item(f"{options.codec} encoder (estimate)", held)
        memory = _stage("decode", (*items, encoder), work, gpu=gpu)
        candidates.append(Candidate(plan, decode_text(plan, gpu=gpu), memory))
    return tuple(candidates)


def _decode_plans(work: Workload, shape: tuple[int, ...], *, gpu: bool) -> list[DecodePlan]:
    """List the plans of a decode of latents [C, T, H, W], the fastest first."""
    first = work.tiling
    if not gpu and first.tiling == "exact" and not work.decoder_engines:
        least = min(CPU_BANDS, shape[2] // BAND_ROWS)
        first = replace(first, strips=max(first.strips, least))
    tilings = [first]
    if first.tiling == "exact":
        counts = [first.strips * 2**n for n in range(8)]
        tilings += [replace(first, strips=n) for n in counts if first.strips < n <= shape[2]]
    if gpu and first.tiling == "exact" and first.caches == "device":
        tilings += [replace(tiling, caches="host") for tiling in tilings]
    plans = [DecodePlan(tiling=tiling) for tiling in tilings]
    if work.decoder_engines:  # each engine fits one size
        plans.insert(0, DecodePlan(tiling=first, engines=True))
    return plans


def _on_a_cpu(config: VaeConfig, items: Iterable[MemoryItem]) -> tuple[MemoryItem, ...]:
    """List what a decode on a CPU takes beside tensors."""
    shapes = expected_shapes("vae", config).items()
    largest = max(4 * math.prod(shape) for name, shape in shapes if name.startswith("decoder."))
    gaps = sum(item.bytes for item in items) // HEAP_GAPS
    return (
        _process_item("a weight in oneDNN's layout", largest),
        _process_item("code of oneDNN and the encoder", LIBRARIES),
        _process_item("gaps of the heap (estimate)", gaps),
    )


def waiting_bytes(work: Workload) -> int:
    """Return the bytes of what the prompts have between the stages: contexts, drafts, noise.

    They wait on the host. Contexts are counted as long as the model takes them. The last stage's
    latents wait on the disk, so a run of one stage holds no drafts.
    """
    low = 4 if work.options.compute_precision == "fp32" else 2
    context = low * max(dit.text_len * dit.text_dim for dit in work.transformers.values())
    passes = {name for stage in work.stages.values() for name in stage.passes}
    each = context * ("cond" in passes)
    if len(work.stages) > 1:
        each += 2 * 4 * math.prod(latent_shape(work.stages["draft"], work.preset.video))
    return work.prompts * each + context * ("uncond" in passes)


def _process_item(name: str, size: int, place: Place = "host") -> MemoryItem:
    return MemoryItem(name=name, kind="process", bytes=size, place=place)


def _decode_items(
    config: VaeConfig, shape: tuple[int, ...], tiling: TilingConfig, itemsize: int
) -> tuple[MemoryItem, ...]:
    """List what a decode takes, also with strips that are blended."""
    _, frames, rows, columns = shape
    if tiling.tiling == "exact":
        return decode_memory(
            config,
            frames=frames,
            rows=rows,
            columns=columns,
            strips=tiling.strips,
            itemsize=itemsize,
            caches=tiling.caches,
        )
    # Each strip is a picture of its own, with caches of its own; they run one after the other.
    items: dict[tuple[str, Place], MemoryItem] = {}
    for strip in make_strips(columns, tiling.strips, tiling.overlap):
        width = strip.last - strip.first
        alone = decode_memory(config, frames=frames, rows=rows, columns=width, itemsize=itemsize)
        for item in alone:
            earlier = items.get((item.name, item.place), replace(item, bytes=0))
            caches = earlier.bytes + item.bytes
            size = caches if item.kind == "caches" else max(earlier.bytes, item.bytes)
            items[item.name, item.place] = replace(item, bytes=size)
    blended = 4 * PIXEL_CHANNELS * 4 * (8 * rows) * (8 * columns)
    frames_item = MemoryItem(
        name="blended frames", kind="activations", bytes=blended, place="device"
    )
    return (*items.values(), frames_item)


def decode_text(plan: DecodePlan, *, gpu: bool) -> str:
    """Describe how a clip is decoded."""
    tiling = plan.tiling
    kind = "band" if tiling.tiling == "exact" else "blended strip"
    pieces = f"{tiling.strips} {kind}s" if tiling.strips > 1 else "the picture as a whole"
    where = f", past frames on the {'GPU' if tiling.caches == 'device' else 'host'}"
    return "on engines, " * plan.engines + pieces + where * gpu


def _moved(items: Iterable[MemoryItem], place: Place) -> tuple[MemoryItem, ...]:
    return tuple(replace(item, place=place) for item in items)


def _stage(
    name: str, items: Iterable[MemoryItem], work: Workload, *, gpu: bool = False
) -> StageMemory:
    """Return a stage's items and what is always in memory beside them, the largest first."""
    more = [_process_item("Python and its libraries", work.process)]
    if name != "decode" and (waiting := waiting_bytes(work)):
        more.append(
            _process_item(
                f"text and drafts of {work.prompts} prompt{'s' * (work.prompts > 1)}", waiting
            )
        )
    if gpu:
        more.append(_process_item("CUDA (estimate)", DEVICE_RESERVE, "device"))
    return StageMemory(
        stage=name, items=tuple(sorted((*items, *more), key=lambda item: -item.bytes))
    )
