# SPDX-License-Identifier: Apache-2.0
"""How a run fits into the memory there is: decided before anything is loaded, stage by stage.

For each stage there is a ladder of ways, the fastest first; the first one that fits is taken. When
memory runs out all the same, the stage goes on in a smaller one (fitting.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from pw_runtime.errors import BadRequest
from pw_runtime.models import expected_shapes
from pw_runtime.models.tiling import make_strips
from pw_runtime.models.vae import PIXEL_CHANNELS
from pw_runtime.planning.decode_memory import decode_memory
from pw_runtime.planning.transformer_memory import stage_memory, text_memory
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import (
    Budget,
    Codec,
    DecodePlan,
    MemoryItem,
    Place,
    Residency,
    RunPlan,
    StageMemory,
    StageName,
    TilingConfig,
    TransformerPlan,
    VaeConfig,
)

GIB = 2**30
WEIGHTS = ("weights", "weights of no block", "places for one block", "weights of the text encoder")
# Bands that a CPU decodes in as fast as in one, in less memory: measured with 1 to 16 of them;
# with two rows of the latent in each it was 10 % slower.
CPU_BANDS, BAND_ROWS = 4, 8
HEAP_GAPS = 20  # a twentieth of the tensors: 3 to 7 % were measured
LIBRARIES = 80 * 2**20  # measured: code that the decode is the first to read, and what oneDNN makes
# Beside what PyTorch allocates a process on a GPU takes memory for its code, for cuBLAS and cuDNN
# and for gaps between allocations. An estimate: not measured by this project.
DEVICE_RESERVE = GIB
SMALLER_PART = 2048  # tokens, where even one part at a time has to be smaller
# Frames of 1.5 bytes a pixel that an encoder holds: measured at 1280x704, on two threads.
ENCODER_FRAMES: Mapping[Codec, int] = MappingProxyType(
    {"h264": 90, "hevc": 150, "av1": 210, "ffv1": 10}
)


Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Choice]):
    """One way to run a stage, and what it takes."""

    choice: Choice
    name: str
    memory: StageMemory

    @property
    def weights(self) -> int:
        """Bytes of weights where the stage computes."""
        return sum(item.bytes for item in self.memory.items if item.name in WEIGHTS)


Candidates = Mapping[str, tuple[Candidate[Any], ...]]
"""Stage -> its ways, the fastest first."""


def candidates(work: Workload, *, gpu: bool, decode_only: bool = False) -> Candidates:
    """The ways of every stage of a run, or of the decode alone."""
    found: dict[str, tuple[Candidate[Any], ...]] = {}
    if not decode_only:
        found["text"] = text_candidates(work, gpu=gpu)
        found |= {name: transformer_candidates(work, name, gpu=gpu) for name in work.stages}
    return found | {"decode": decode_candidates(work, gpu=gpu)}


def make_plan(ways: Candidates, budget: Budget) -> RunPlan:
    """Fit a run into a budget: of each stage the first way that fits.

    Raises BadRequest where it cannot work, with the nearest budget that can.
    """
    _require_fit([*ways.values()], budget)
    taken = {stage: _first(one, budget) for stage, one in ways.items()}
    return plan_of(budget, taken, [_decision(one, budget) for one in ways.values()])


def plan_of(
    budget: Budget, taken: Mapping[str, Candidate[Any]], decisions: Sequence[str]
) -> RunPlan:
    """The plan that takes one way for each stage."""
    networks = {name: way.choice for name, way in taken.items() if name not in ("text", "decode")}
    return RunPlan(
        budget=budget,
        text=taken["text"].choice if "text" in taken else None,
        networks=cast(dict[StageName, TransformerPlan], networks),
        decode=taken["decode"].choice,
        stages=tuple(way.memory for way in taken.values()),
        decisions=tuple(decisions),
    )


def fits(memory: StageMemory, budget: Budget) -> bool:
    """Whether a stage stays within a budget."""
    return memory.peak("host") <= budget.host and memory.peak("device") <= (budget.device or 0)


def _first(ways: Sequence[Candidate[Choice]], budget: Budget) -> Candidate[Choice]:
    return next(way for way in ways if fits(way.memory, budget))


def _decision(ways: Sequence[Candidate[Any]], budget: Budget) -> str:
    """What was taken for a stage, and why not what is faster."""
    way = _first(ways, budget)
    place: Place = "host" if budget.device is None else "device"
    text = f"{way.memory.stage}: {way.name}, {gib(way.memory.peak(place))}"
    if way is ways[0]:
        return text
    faster = ways[0].memory
    over: Place = "host" if faster.peak("host") > budget.host else "device"
    where = "host memory" if over == "host" else "GPU memory"
    return f"{text}; {ways[0].name} would take {gib(faster.peak(over))} of {where}"


def _require_fit(stages: Sequence[Sequence[Candidate[Any]]], budget: Budget) -> None:
    """Raise BadRequest where a stage has no way that fits."""
    wrong = [ways for ways in stages if not any(fits(way.memory, budget) for way in ways)]
    if not wrong:
        return
    least = [min(ways, key=lambda way: _strain(way.memory, budget)).memory for ways in stages]
    device = max(memory.peak("device") for memory in least)
    need = Budget(
        host=max(budget.host, *(memory.peak("host") for memory in least)),
        device=None if budget.device is None else max(budget.device, device),
    )
    raise BadRequest(
        f"the {' and the '.join(ways[0].memory.stage for ways in wrong)} stage cannot run",
        got=budget_text(budget),
        wanted=f"{budget_text(need)}, the nearest that this clip and model run in",
        do="free memory, name a larger budget, or take a smaller preset or fewer frames"
        # On a CPU bf16 takes many times as long.
        + (", or --vae-precision bf16 for the decode" if budget.device is not None else ""),
    )


def _strain(memory: StageMemory, budget: Budget) -> float:
    """How many times the budget a stage takes."""
    host = memory.peak("host") / max(1, budget.host)
    if budget.device is None:
        return host
    return max(host, memory.peak("device") / max(1, budget.device))


def budget_text(budget: Budget) -> str:
    """A budget as a user reads it."""
    host = f"{gib(budget.host)} of host memory"
    return host if budget.device is None else f"{gib(budget.device)} of GPU memory, {host}"


def gib(size: int) -> str:
    """Bytes in GiB, rounded up to a tenth of one; in MiB where they are few."""
    if size < GIB:
        return f"{-(-size // 2**20)} MiB"
    return f"{-(-size * 10 // GIB) / 10:.1f} GiB"


# ---- the candidates ------------------------------------------------------------------------------


def text_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[Place], ...]:
    """On the GPU, else on the CPU."""
    items = text_memory(work.text_encoder, work.precision)
    moved = _stage("text", _moved(items, "host"), work)
    ways: list[Candidate[Place]] = [Candidate("host", "on the CPU", moved)]
    if gpu:
        ways.insert(0, Candidate("device", "on the GPU", _stage("text", items, work, gpu=True)))
    return tuple(ways)


def transformer_candidates(
    work: Workload, name: StageName, *, gpu: bool
) -> tuple[Candidate[TransformerPlan], ...]:
    """Resident weights, then streamed ones; with the shared first attention, then without."""
    elsewhere: tuple[Residency, ...] = ("mapped",)
    if gpu and work.stored[name] != work.precision:  # converted once; else the files are as good
        elsewhere = ("streamed", "mapped")
    parts = [work.chunk] if work.padded else [work.chunk, min(work.chunk, SMALLER_PART)]
    ways = []
    for weights in ("resident", *elsewhere):
        tried = [(True, work.chunk), *((False, part) for part in dict.fromkeys(parts))]
        for share, part in tried:
            plan = TransformerPlan(weights=weights, share=share, part=part)
            config, stage = work.transformers[name], work.stages[name]
            video, padded = work.preset.video, work.padded
            items = stage_memory(config, stage, video, work.precision, plan, padded=padded)
            if not gpu:
                items = _moved(items, "host")
            memory = _stage(name, items, work, gpu=gpu)
            ways.append(Candidate(plan, network_text(plan), memory))
    return tuple(ways)


def network_text(plan: TransformerPlan) -> str:
    """How a transformer runs, in words."""
    weights = {
        "resident": "weights resident",
        "streamed": "weights streamed from host memory",
        "mapped": "weights streamed from the bundle's files",
    }[plan.weights]
    share = "first attention shared" if plan.share else "first attention not shared"
    return f"{weights}, {share}, up to {plan.part} tokens at a time"


def decode_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[DecodePlan], ...]:
    """More and more bands, which change rounding alone; then past frames on the host."""
    first, last = work.decode, list(work.stages.values())[-1]
    shape = latent_shape(last, work.preset.video)
    if not gpu and first.tiling == "exact" and not work.decoder_engines:
        least = min(CPU_BANDS, shape[2] // BAND_ROWS)
        first = replace(first, strips=max(first.strips, least))
    cuts = [first]
    if first.tiling == "exact":
        counts = [first.strips * 2**n for n in range(8)]
        cuts += [replace(first, strips=n) for n in counts if first.strips < n <= shape[2]]
    if gpu and first.tiling == "exact" and first.caches == "device":
        cuts += [replace(cut, caches="host") for cut in cuts]
    plans = [DecodePlan(cut=cut) for cut in cuts]
    if work.decoder_engines:  # which are of one size each
        plans.insert(0, DecodePlan(cut=first, engines=True))
    ways = []
    for plan in plans:
        itemsize = 4 if work.vae_precision == "fp32" else 2
        items = _decode_items(work.vae, shape, plan.cut, itemsize)
        if not gpu:
            items = (*_moved(items, "host"), *_on_a_cpu(work.vae, items))
        frame = 3 * last.width * last.height // 2
        held = ENCODER_FRAMES[work.codec] * frame
        encoder = MemoryItem(name=f"{work.codec} encoder (estimate)", bytes=held, place="host")
        memory = _stage("decode", (*items, encoder), work, gpu=gpu)
        ways.append(Candidate(plan, decode_text(plan, gpu=gpu), memory))
    return tuple(ways)


def _on_a_cpu(config: VaeConfig, items: Iterable[MemoryItem]) -> tuple[MemoryItem, ...]:
    """What a decode takes beside tensors: a weight in oneDNN's order, code, gaps of the heap."""
    shapes = expected_shapes("vae", config).items()
    largest = max(4 * math.prod(shape) for name, shape in shapes if name.startswith("decoder."))
    return (
        MemoryItem(name="a weight in oneDNN's order", bytes=largest, place="host"),
        MemoryItem(name="code of oneDNN and the encoder", bytes=LIBRARIES, place="host"),
        MemoryItem(
            name="gaps of the heap (estimate)",
            bytes=sum(item.bytes for item in items) // HEAP_GAPS,
            place="host",
        ),
    )


def _decode_items(
    config: VaeConfig, shape: tuple[int, ...], plan: TilingConfig, itemsize: int
) -> tuple[MemoryItem, ...]:
    """What a decode takes, of strips that are blended too."""
    _, frames, rows, columns = shape
    if plan.tiling == "exact":
        return decode_memory(
            config,
            frames=frames,
            rows=rows,
            columns=columns,
            strips=plan.strips,
            itemsize=itemsize,
            caches=plan.caches,
        )
    # Each strip is a picture of its own, with memory of its own; they run one after the other.
    total = Counter[tuple[str, Place]]()
    for strip in make_strips(columns, plan.strips, plan.overlap):
        width = strip.last - strip.first
        alone = decode_memory(config, frames=frames, rows=rows, columns=width, itemsize=itemsize)
        for item in alone:
            key = item.name, item.place
            own = "caches" in item.name
            total[key] = total[key] + item.bytes if own else max(total[key], item.bytes)
    total["blended frames", "device"] = 4 * PIXEL_CHANNELS * 4 * (8 * rows) * (8 * columns)
    return tuple(MemoryItem(name=n, bytes=size, place=place) for (n, place), size in total.items())


def decode_text(plan: DecodePlan, *, gpu: bool) -> str:
    """How a clip is decoded, in words."""
    cut = plan.cut
    kind = "band" if cut.tiling == "exact" else "blended strip"
    pieces = f"{cut.strips} {kind}s" if cut.strips > 1 else "the picture as a whole"
    where = f", past frames on the {'GPU' if cut.caches == 'device' else 'host'}"
    return "on engines, " * plan.engines + pieces + where * gpu


def _moved(items: Iterable[MemoryItem], place: Place) -> tuple[MemoryItem, ...]:
    return tuple(replace(item, place=place) for item in items)


def _stage(
    name: str, items: Iterable[MemoryItem], work: Workload, *, gpu: bool = False
) -> StageMemory:
    """A stage's items and what always lives beside them, the largest first."""
    more = [MemoryItem(name="Python and its libraries", bytes=work.process, place="host")]
    if gpu:
        reserve = MemoryItem(name="CUDA (estimate)", bytes=DEVICE_RESERVE, place="device")
        more.append(reserve)
    return StageMemory(
        stage=name, items=tuple(sorted((*items, *more), key=lambda item: -item.bytes))
    )
