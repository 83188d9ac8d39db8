# SPDX-License-Identifier: Apache-2.0
"""Candidates of each stage: the ways to run it, the fastest first, and the memory of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pw_runtime.planning.decode_choices import decode_choices, decode_text, process_item
from pw_runtime.planning.transformer_memory import stage_memory, text_memory
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import (
    Blocks,
    DecodePlan,
    MemoryItem,
    Pass,
    Place,
    Residency,
    StageMemory,
    StageName,
    TransformerPlan,
)

# Beyond what PyTorch allocates, a process on a GPU needs memory for its code, for cuBLAS and cuDNN
# and for gaps between allocations. An estimate: not measured by this project.
DEVICE_RESERVE = 2**30
SMALLER_CHUNK = 2048  # tokens per engine call, where the usual chunk does not fit
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
    if work.options.linear != "exact":
        # The files do not have the quantized weights, and no block waits for them to be made.
        off_device = ("streamed",) if gpu else ()
    elif gpu and work.stored[name] != work.options.compute_precision:
        # Converted once into host memory; where the precision matches, the files are as good.
        off_device = ("streamed", "mapped")
    full, passes = work.options.chunk, work.stages[name].passes
    whole = work.options.blocks == "whole"  # has no chunks and no attention to share
    chunks = [full] if work.padded or whole else [full, min(full, SMALLER_CHUNK)]
    options = []
    for weights in ("resident", *off_device):
        variants = [(False, chunk) for chunk in dict.fromkeys(chunks)]
        if len(passes) > 1 and not whole:
            variants.insert(0, (True, full))
        for share, chunk in variants:
            plan = TransformerPlan(weights=weights, share_attention=share, chunk=chunk)
            items = stage_memory(
                work.transformers[name],
                work.stages[name],
                work.preset.video,
                work.options.compute_precision,
                plan,
                linear=work.options.linear,
                padded=work.padded,
                on_engines=bool(work.scratch.get(name)),
                blocks=work.options.blocks,
            )
            if not gpu:
                items = _moved(items, "host")
            memory = _stage(name, items, work, gpu=gpu)
            text = transformer_text(plan, passes, work.options.blocks)
            options.append(Candidate(plan, text, memory))
    return tuple(options)


def transformer_text(plan: TransformerPlan, passes: tuple[Pass, ...], blocks: Blocks) -> str:
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
    if blocks == "whole":
        return f"{weights}, each block in one call"
    on_engine = ", attention on an engine" * (blocks == "attention")
    return f"{weights}, {share}, up to {plan.chunk} tokens per call{on_engine}"


def decode_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[DecodePlan], ...]:
    """List the decode's candidates."""
    return tuple(
        Candidate(plan, decode_text(plan), _stage("decode", items, work, gpu=gpu))
        for plan, items in decode_choices(work, gpu=gpu)
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


def _moved(items: Iterable[MemoryItem], place: Place) -> tuple[MemoryItem, ...]:
    return tuple(replace(item, place=place) for item in items)


def _stage(
    name: str, items: Iterable[MemoryItem], work: Workload, *, gpu: bool = False
) -> StageMemory:
    """Return a stage's items and what is always in memory beside them, the largest first."""
    more = [process_item("Python and its libraries", work.process)]
    if name != "decode" and (waiting := waiting_bytes(work)):
        more.append(
            process_item(
                f"text and drafts of {work.prompts} prompt{'s' * (work.prompts > 1)}", waiting
            )
        )
    if gpu:
        more.append(process_item("CUDA (estimate)", DEVICE_RESERVE, "device"))
    if gpu and work.held_scratch:
        more.append(
            MemoryItem(
                name="scratch memory of the engines",
                kind="scratch",
                bytes=work.held_scratch,
                place="device",
            )
        )
    return StageMemory(
        stage=name, items=tuple(sorted((*items, *more), key=lambda item: -item.bytes))
    )
