# SPDX-License-Identifier: Apache-2.0
"""Candidates of each stage: the ways to run it, the fastest first, and the memory of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from pw_runtime.errors import BadRequest
from pw_runtime.execution.sparse_stage import kept_fraction
from pw_runtime.planning.decode_choices import decode_choices, decode_text, process_item
from pw_runtime.planning.encode_memory import encode_memory
from pw_runtime.planning.stage_times import transformer_seconds
from pw_runtime.planning.transformer_memory import stage_memory, stage_slices, text_memory
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import (
    Blocks,
    DecodePlan,
    MemoryItem,
    Pass,
    Place,
    Residency,
    Split,
    StageMemory,
    StageName,
    TransformerPlan,
)

# Beyond what PyTorch allocates, a process on a GPU needs memory for its code, for cuBLAS and cuDNN
# and for gaps between allocations. An estimate: not measured by this project.
DEVICE_RESERVE = 2**30
LINK_RESERVE = 2**29  # buffers of a process that exchanges with others; an estimate too
ALIKE = 1.1  # times the fastest: then where the weights are decides, and costs that no model has
SMALLER_CHUNK = 2048  # tokens per engine call, where the usual chunk does not fit
_BF16_ON_A_CPU = " (far slower on a CPU without AVX-512 BF16 or AMX: `pw doctor` says which it has)"
Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Choice]):
    """One way to run a stage, and the memory it takes.

    `advice` is what would make every way smaller.
    """

    choice: Choice
    name: str
    memory: StageMemory
    advice: str = ""

    def weights(self, place: Place) -> int:
        """Return the bytes of weights that a budget must have; see `StageMemory.required`."""
        by_rank = [
            sum(item.bytes for item in items if (item.place, item.kind) == (place, "weights"))
            for items in (self.memory.items, *self.memory.others)
        ]
        return sum(by_rank) if place == "host" else max(by_rank)


Candidates = Mapping[str, tuple[Candidate[Any], ...]]
"""Stage -> its candidates, the fastest first."""


def candidates(work: Workload, *, gpu: bool, needed: Collection[str] | None = None) -> Candidates:
    """List the candidates of every stage of a run, or of those `needed` and the decode.

    Raises BadRequest for more ranks than any stage can use.
    """
    stages: dict[str, tuple[Candidate[Any], ...]] = {}
    if needed is None or "text" in needed:
        stages["text"] = text_candidates(work, gpu=gpu)
    if work.encoded and (needed is None or "encode" in needed):
        stages["encode"] = encode_candidates(work, gpu=gpu)
    for name in work.stages:
        if needed is None or name in needed:
            stages[name] = transformer_candidates(work, name, gpu=gpu)
    stages["decode"] = decode_candidates(work, gpu=gpu)
    _require_useful_ranks(work, stages)
    return stages


def _require_useful_ranks(work: Workload, stages: Candidates) -> None:
    """Raise BadRequest where some ranks would wait from the first stage to the last."""
    used = {
        name: max(computing_ranks(option.choice) for option in options)
        for name, options in stages.items()
    }
    if work.ranks <= max(used.values()):
        return
    listed = ", ".join(f"{name} {count}" for name, count in used.items())
    raise BadRequest(
        "there are more ranks than any stage of this clip can use",
        got=f"{work.ranks} ranks; of these each stage can use: {listed}",
        wanted=f"at most {max(used.values())}",
        do="name fewer devices, or a smaller --chunk, which divides the tokens into more slices "
        "and changes the result by rounding",
    )


def computing_ranks(choice: Place | TransformerPlan | DecodePlan) -> int:
    """Return how many ranks compute in a stage; the text is encoded by the first one."""
    if isinstance(choice, TransformerPlan):
        return choice.split.ranks
    return choice.ranks if isinstance(choice, DecodePlan) else 1


def text_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[Place], ...]:
    """List the candidates of the text stage: on the GPU, on the CPU."""
    items = text_memory(work.text_encoder, work.options.compute_precision)
    return _on_gpu_or_cpu("text", items, work, gpu=gpu)


def encode_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[Place], ...]:
    """List the candidates of the stage that encodes pictures and videos: on the GPU, on the CPU."""
    encoded = [(stage, False) for stage in work.encoded]
    encoded += [(work.stages["draft"], True)] * work.video
    items = max(
        (
            encode_memory(work.vae, width=stage.width, height=stage.height, video=video)
            for stage, video in encoded
        ),
        key=lambda items: sum(item.bytes for item in items),
    )
    return _on_gpu_or_cpu("encode", items, work, gpu=gpu)


def _on_gpu_or_cpu(
    name: str, items: tuple[MemoryItem, ...], work: Workload, *, gpu: bool
) -> tuple[Candidate[Place], ...]:
    """List both places of a stage that is `items` on either."""
    moved = _stage(name, [_moved(items, "host")], work)
    options: list[Candidate[Place]] = [Candidate("host", "on the CPU", moved)]
    if gpu:
        options.insert(0, Candidate("device", "on the GPU", _stage(name, [items], work, gpu=True)))
    return tuple(options)


def transformer_candidates(
    work: Workload, name: StageName, *, gpu: bool
) -> tuple[Candidate[TransformerPlan], ...]:
    """List a transformer's candidates.

    Resident weights, then those divided among ranks, then streamed ones; of each with the shared
    first attention, then without. Of several divisions among ranks, those that are within a tenth
    of the fastest come first.
    """
    plans = [
        plan
        for weights in _residencies(work, name, gpu=gpu)
        for plan in variants(work, name, weights)
    ]
    if work.ranks > 1:
        times = {plan: transformer_seconds(work, name, plan, work.rates) for plan in plans}
        order = {plan.weights: index for index, plan in reversed(list(enumerate(plans)))}
        slow = ALIKE * min(times.values())
        plans.sort(
            key=lambda plan: (
                times[plan] > slow,
                order[plan.weights],
                plan.chunk != work.options.chunk,  # another one rounds differently
                times[plan],
            )
        )
    return tuple(
        Candidate(
            plan,
            transformer_text(
                plan,
                work.stages[name].passes,
                work.options.blocks,
                work.ranks,
                merges=name in work.loras,
            ),
            _stage(
                name,
                [_of_rank(work, name, plan, rank, gpu=gpu) for rank in range(plan.split.ranks)],
                work,
                gpu=gpu,
            ),
        )
        for plan in plans
    )


def _residencies(work: Workload, name: StageName, *, gpu: bool) -> tuple[Residency, ...]:
    """List where the weights can be."""
    off_device: tuple[Residency, ...] = ("mapped",)
    if work.divide_weights:
        return ("gathered",)
    if work.options.linear != "exact":
        # The files do not have the quantized weights, and no block waits for them to be made.
        return ("resident", "streamed") if gpu else ("resident",)
    if gpu and (name in work.loras or work.stored[name] != work.options.compute_precision):
        # Converted and merged once into host memory; without either, the files are as good.
        off_device = ("streamed", "mapped")
    return ("resident", *(("gathered",) if work.ranks > 1 else ()), *off_device)


def variants(work: Workload, name: StageName, weights: Residency) -> list[TransformerPlan]:
    """List the plans with weights in one place: divisions, shared attention, size of the chunk."""
    full, passes = work.options.chunk, len(work.stages[name].passes)
    whole = work.options.blocks == "whole"  # has no chunks and no attention to share
    chunks = [full] if work.padded or whole else [full, min(full, SMALLER_CHUNK)]
    plans = []
    for split in splits(work, name):
        variants = [(False, chunk) for chunk in dict.fromkeys(chunks)]
        if passes > split.guidance and not whole:
            variants.insert(0, (True, full))
        plans += [
            TransformerPlan(weights=weights, share_attention=share, chunk=chunk, split=split)
            for share, chunk in variants
            if weights != "gathered" or split.ranks > 1
        ]
    return plans


def splits(work: Workload, name: StageName) -> list[Split]:
    """List the divisions of a stage among the ranks: as many of them as can take part, and one.

    A rank has whole slices of tokens. Engines that hold attention take all tokens, or fixed groups
    of heads: one rank runs those. Sparse attention has at most as many ranks as heads.
    """
    if work.options.blocks != "segments":
        return [Split()]
    slices = len(
        stage_slices(work.stages[name], work.preset.video, work.options.chunk, padded=work.padded)
    )
    if kept_fraction(work.options, name) is not None:  # the queries of a head stay together
        slices = min(slices, work.transformers[name].num_heads)
    most = work.sequence or work.ranks  # ranks of one pass
    found = {
        Split(guidance=guidance, sequence=sequence)
        for guidance in range(1, min(len(work.stages[name].passes), work.ranks) + 1)
        for sequence in (1, min(most, work.ranks // guidance, slices))
        if work.sequence is None or sequence == min(most, slices)
    }
    return sorted(found, key=lambda split: (split.guidance, -split.sequence))


def _of_rank(
    work: Workload, name: StageName, plan: TransformerPlan, rank: int, *, gpu: bool
) -> tuple[MemoryItem, ...]:
    """List what a rank has at the peak of a denoising stage."""
    ways = [False, True] if work.stages[name] in work.encoded else [False]  # the clips may differ
    items = max(
        (
            stage_memory(
                work.transformers[name],
                work.stages[name],
                work.preset.video,
                work.options.compute_precision,
                plan,
                linear=work.options.linear,
                padded=work.padded,
                on_engines=bool(work.scratch.get(name)),
                blocks=work.options.blocks,
                keep=kept_fraction(work.options, name),
                rank=rank,
                kept=_kept_latents(work, name),
                merges=name in work.loras,
                clean=clean,
            )
            for clean in ways
        ),
        key=lambda items: sum(item.bytes for item in items),
    )
    return items if gpu else _moved(items, "host")


def _kept_latents(work: Workload, name: StageName) -> int:
    """Count the latents that a stage keeps beside its solver's: two velocities, or a difference."""
    if name == "draft":
        return 2 if work.options.step_cache is not None else 0
    return 1 if work.options.guidance_reuse else 0


def transformer_text(
    plan: TransformerPlan,
    passes: tuple[Pass, ...],
    blocks: Blocks,
    ranks: int = 1,
    *,
    merges: bool = False,
) -> str:
    """Describe how a transformer runs, on one of several ranks too, with LoRAs if it `merges`."""
    weights = {
        "resident": "weights resident",
        "gathered": "weights divided among the ranks",
        "streamed": "weights streamed from host memory",
        "mapped": "weights streamed from the bundle's files",
    }[plan.weights]
    if merges and plan.weights == "mapped":
        weights += " with the LoRA merged at every use"
    if ranks > 1:
        weights = f"{split_text(plan.split)}, {weights}"
    share = "first attention shared" if plan.share_attention else "first attention not shared"
    if len(passes) == 1:
        text = "the prompt" if passes == ("cond",) else "the negative prompt"
        share = f"one pass per step, with {text} (guidance {int(passes == ('cond',))})"
    if blocks == "whole":
        return f"{weights}, each block in one call"
    on_engine = ", attention on an engine" * (blocks == "attention")
    return f"{weights}, {share}, up to {plan.chunk} tokens per call{on_engine}"


def split_text(split: Split) -> str:
    """Describe a division among ranks."""
    if split.ranks == 1:
        return "1 rank"
    if split.guidance == 1:
        return f"{split.sequence} ranks for each pass"
    return f"{split.guidance} passes x {split.sequence} rank{'s' * (split.sequence > 1)}"


def decode_candidates(work: Workload, *, gpu: bool) -> tuple[Candidate[DecodePlan], ...]:
    """List the decode's candidates."""
    advice = ""
    if work.options.vae_precision == "fp32":
        advice = f"add --vae-precision bf16 for the decode{'' if gpu else _BF16_ON_A_CPU}"
    return tuple(
        Candidate(plan, decode_text(plan), _stage("decode", ranks, work, gpu=gpu), advice)
        for plan, ranks in decode_choices(work, gpu=gpu)
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


def journal_bytes(work: Workload, name: StageName) -> int:
    """Return the bytes on the host that the state between two steps takes while it is written.

    That is the state itself, and the file's content.
    """
    solver = 4 if work.stages[name].solver == "unipc" else 2  # latents of `sampling/solver.py`
    latent = 4 * math.prod(latent_shape(work.stages[name], work.preset.video))
    return 2 * (solver + _kept_latents(work, name)) * latent


def _moved(items: Iterable[MemoryItem], place: Place) -> tuple[MemoryItem, ...]:
    return tuple(replace(item, place=place) for item in items)


def _stage(
    name: str, computing: Sequence[Iterable[MemoryItem]], work: Workload, *, gpu: bool = False
) -> StageMemory:
    """Return what the computing ranks have and what is always in memory beside, the largest first.

    Further ranks wait with the latter alone.
    """
    always = [process_item("Python and its libraries", work.process)]
    waiting = []
    if name != "decode" and (size := waiting_bytes(work)):
        waiting.append(
            process_item(
                f"text and drafts of {work.prompts} prompt{'s' * (work.prompts > 1)}", size
            )
        )
    if name in work.stages:
        size = journal_bytes(work, cast(StageName, name))
        waiting.append(process_item("the state between two steps, while it is written", size))
    on_device = []
    if gpu:
        on_device.append(process_item("CUDA (estimate)", DEVICE_RESERVE, "device"))
    if gpu and work.ranks > 1:
        on_device.append(process_item("NCCL (estimate)", LINK_RESERVE, "device"))
    if gpu and work.held_scratch:
        on_device.append(
            MemoryItem(
                name="scratch memory of the engines",
                kind="scratch",
                bytes=work.held_scratch,
                place="device",
            )
        )
    ranks = [*computing, *([()] * (work.ranks - len(computing)))]
    first, *others = (
        tuple(
            sorted(
                (*items, *always, *(waiting if rank == 0 else ()), *on_device),
                key=lambda item: -item.bytes,
            )
        )
        for rank, items in enumerate(ranks)
    )
    return StageMemory(stage=name, items=first, others=tuple(others))
