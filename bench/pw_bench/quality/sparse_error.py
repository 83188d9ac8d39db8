# SPDX-License-Identifier: Apache-2.0
"""Errors of block-sparse attention, and its CPU time.

    pw bench sparse-error --model BUNDLE --preset FILE.toml --out bench/results/NAME.json

Attention gets the queries, keys and values that the high-res network of the built-in model has in
an exact clip (every third call), and smooth random fields, whose neighbours are alike in time,
height and width. Errors are relative L2 beside exact attention. "dropped" leaves out the means that
stand for the blocks that are not kept, to show what they are worth. Clips are compared by
`pw bench approximations`.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.measure.environment import envelope, identify, usual_operations
from pw_bench.quality.render import Example, examples, load_network, load_renderer
from pw_bench.result_sections import OutputDifference
from pw_bench.results import Figure, Result
from pw_engines.engine import relative_l2
from pw_kernels import attention, sparse_attention
from pw_kernels.attention.sparse import choose_blocks, choose_orders, rows_with_means
from pw_kernels.attention.sparse_variants import BLOCK
from pw_runtime import find_preset
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.errors import BadRequest
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.types import Preset

CPU: Final = torch.device("cpu")
KEEPS: Final = (0.75, 0.5, 0.35, 0.25, 0.15)
FIELD_GRID: Final = (4, 24, 44)  # 4224 tokens
LENGTHS: Final = (4.0, 10.0)  # in tokens, over which fields change; a frame is as far as 4 tokens
WAVES: Final = 64  # of a field
ROUNDS: Final = 5  # of timing
MEASURED_CALLS: Final = 3  # one call of so many is measured

Grid = tuple[int, int, int]


class Listening(SegmentedDiT):
    """A network with exact attention that also computes the errors of sparse attention."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.errors: dict[str, list[float]] = {}
        self.calls = 0

    def _attend(self, grid: Grid) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            exact = attention(q, k, v)
            self.calls += 1
            if self.calls % MEASURED_CALLS:
                return exact
            for name, error in attention_errors(q, k, v, grid, exact):
                self.errors.setdefault(name, []).append(error)
            return exact

        return attend


def measure_sparse_error(model: Path, preset_name: str, say: Callable[[str], None]) -> Result:
    """Measure every fraction of KEEPS.

    Args:
        model: bundle of the built-in model.
        preset_name: of its clip.
        say: called with a line for every part.

    Raises BadRequest, BadWeights, BadResult.
    """
    bundle, preset = open_bundle(model), find_preset(preset_name)
    if preset.highres is None:
        raise BadRequest("sparse attention is for the high-res stage", got="a preset without one")
    identity = identify(CPU, operations=usual_operations(CPU))
    differences: list[OutputDifference] = []
    with torch.inference_mode():
        say("attention of the built-in model")
        differences += _network_differences(bundle, preset, examples(1)[0])
        for length in LENGTHS:
            say(f"attention of fields that change over {length:.0f} tokens")
            q, k, v = smooth_field(FIELD_GRID, length)
            errors = attention_errors(q, k, v, FIELD_GRID, attention(q, k, v))
            words = f"fields that change over {length:.0f} tokens"
            differences += [_difference(f"{name}, {words}", [error]) for name, error in errors]
        say("CPU time of attention")
        figures = tuple(_cpu_times(*smooth_field(FIELD_GRID, LENGTHS[0])))
    tokens = preset.highres.tokens(preset.video)
    scope = {
        "words": "block-sparse attention beside exact attention in fp32",
        "built-in model": f"one of {MEASURED_CALLS} self-attentions of the high-res stage, "
        f"{preset.highres.width}x{preset.highres.height}, {tokens} tokens; max_abs is the largest "
        "relative L2",
        "fields": f"{math.prod(FIELD_GRID)} tokens in 2 heads of 64",
        "times": "CPU time of the process, user and system, in turns",
        "precision": "fp32",
        "device": "cpu",
    }
    identity = replace(identity, weights={model.name: f"sha256:{bundle.digest}"})
    return replace(
        envelope("sparse-error", scope, identity),
        figures=figures,
        differences=tuple(differences),
    )


def attention_errors(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, exact: Tensor
) -> Iterator[tuple[str, float]]:
    """Yield the relative L2 error for every fraction that is kept, with means and without."""
    for keep in KEEPS:
        got = sparse_attention(q, k, v, grid, keep)
        yield f"{keep:.0%} kept", relative_l2(got, exact)
        yield f"{keep:.0%} kept, others dropped", relative_l2(dropped(q, k, v, grid, keep), exact)


def dropped(q: Tensor, k: Tensor, v: Tensor, grid: Grid, keep: float) -> Tensor:
    """Compute attention to the kept blocks alone, [S, N, K], by a mask."""
    order = choose_orders(k, grid)
    result = torch.empty_like(q)
    for head in range(q.shape[1]):
        place = order[:, head]
        part = [x[place, head : head + 1] for x in (q, k, v)]
        kept = choose_blocks(part[0], rows_with_means(part[1]), keep)[0].long()  # [B, n]
        mask = torch.zeros(len(kept), len(kept), dtype=torch.bool).scatter_(1, kept, True)
        by_token = mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        heads = [x.transpose(0, 1)[None] for x in part]  # [1, 1, S, K]
        out = F.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], attn_mask=by_token[: len(q), : len(q)]
        )
        result[place, head] = out[0, 0]
    return result


def smooth_field(grid: Grid, length: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, [S, 2, 64], that vary smoothly over the grid, with noise of half as much.

    Queries and keys are of one field, so that tokens attend to what is like them.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    axes = (torch.arange(n, dtype=torch.float32) for n in grid)
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # [S, 3]
    place = place * torch.tensor([4.0, 1.0, 1.0])

    def field() -> Tensor:
        phases = place @ (normal(3, WAVES) / length) + 2 * math.pi * torch.rand(
            WAVES, generator=generator
        )
        waves = phases.cos() * (2 / WAVES) ** 0.5  # [S, WAVES]
        return (waves @ normal(WAVES, 128)).unflatten(1, (2, 64))

    alike, values = field(), field()
    q, k, v = (x + 0.5 * normal(*x.shape) for x in (alike, alike, values))
    return 1.5 * q, k, v


def _network_differences(
    bundle: Bundle, preset: Preset, example: Example
) -> Iterator[OutputDifference]:
    """Compare attention in every step and block of an exact clip."""
    renderer = load_renderer(bundle)
    assert preset.highres is not None
    listening = load_network(bundle, "highres", Listening)
    assert isinstance(listening, Listening)
    low = renderer.draft_latent(example, preset)
    renderer.highres_latent(example, low, preset, listening, preset.highres.steps)
    for name, errors in listening.errors.items():
        yield _difference(f"{name}, built-in model", errors)


def _difference(side: str, errors: list[float]) -> OutputDifference:
    """Return the mean of relative errors, and the largest."""
    return OutputDifference(
        side=side,
        against="exact",
        max_abs=max(errors),
        unit="of the result, relative L2 of the worst call",
        relative_l2=sum(errors) / len(errors),
    )


def _cpu_times(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Figure]:
    """Measure the CPU time of exact and sparse attention in turns."""
    runs = {"exact": partial(attention, q, k, v)}
    for keep in KEEPS:
        runs[f"{keep:.0%} kept"] = partial(sparse_attention, q, k, v, FIELD_GRID, keep)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            before = _cpu_seconds()
            run()
            samples[name].append(_cpu_seconds() - before)
    for name, seconds in samples.items():  # the first round warms up
        yield Figure(name=f"attention, {name}", unit="s", samples=tuple(seconds[1:]))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
