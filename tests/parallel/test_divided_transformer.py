# SPDX-License-Identifier: Apache-2.0
"""A transformer divided among ranks gives the bits of one rank, and moves what is planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pw_engines import DTYPES
from pw_runtime.execution.division import attention_shares, owned_slices, step_traffic
from pw_runtime.execution.gathered_weights import packed_layout
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.types import DitConfig, Precision, Split
from tests.parallel.ranks import run
from tests.parallel.transformers import CONFIG, HIGHRES, LIMIT, STAGE, make_clip, whole

SIZES = (8, 8, 8, 7, 7, 7)  # tokens of the slices
WITH_PICTURE = (8, 7, 8, 8, 7, 7)  # those of the first latent frame, and those of the others
CASES: dict[int, list[dict[str, Any]]] = {
    1: [{"split": {"guidance": 1, "sequence": 1}}],
    2: [
        {"split": {"guidance": 1, "sequence": 2}},
        {"split": {"guidance": 2, "sequence": 1}, "highres": True},
        {"split": {"guidance": 1, "sequence": 2}, "highres": True, "precision": "bf16"},
        {"split": {"guidance": 1, "sequence": 2}, "gathered": True, "precision": "bf16"},
        {"split": {"guidance": 1, "sequence": 2}, "picture": True, "precision": "bf16"},
        {"split": {"guidance": 2, "sequence": 1}, "picture": True, "highres": True},
    ],
    3: [
        {"split": {"guidance": 1, "sequence": 3}, "highres": True, "gathered": True},
        {"split": {"guidance": 2, "sequence": 1}},  # one rank waits
        {"split": {"guidance": 1, "sequence": 3}, "padded": True},
        {"split": {"guidance": 1, "sequence": 3}, "padded": True, "picture": True},
    ],
    4: [
        {"split": {"guidance": 1, "sequence": 4}, "highres": True},  # more ranks than heads
        {"split": {"guidance": 2, "sequence": 2}, "highres": True, "gathered": True},
        {"split": {"guidance": 1, "sequence": 4}, "highres": True, "picture": True},
    ],
    5: [{"split": {"guidance": 1, "sequence": 5}, "highres": True, "precision": "bf16"}],
}


def test_every_slice_and_every_query_of_every_head_belongs_to_one_rank() -> None:
    for heads in (1, 2, 3, 5, 24):
        for ranks in range(1, 13):
            owned = owned_slices(12, ranks)
            assert [i for slices in owned for i in slices] == list(range(12))
            taken = [
                (head, i)
                for share in attention_shares(heads, 12, ranks)
                for head in share.heads
                for i in share.slices
            ]
            assert sorted(taken) == [(head, i) for head in range(heads) for i in range(12)]


def test_latents_are_equal_bit_for_bit_on_one_to_five_ranks(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made_by = run("tests.parallel.transformers:clips", tmp_path, list(CASES), json.dumps(CASES))
    for count, cases in CASES.items():
        results = made_by[count]
        for rank, result in enumerate(results):
            assert not isinstance(result, str), f"{count} ranks, rank {rank}: {result}"
        for index, case in enumerate(cases):
            config = HIGHRES if case.get("highres") else CONFIG
            net = whole(config, case.get("precision", "fp32"), padded=bool(case.get("padded")))
            with torch.inference_mode():
                picture = bool(case.get("picture"))
                expected = [make_clip(net, config, seed, picture=picture) for seed in range(2)]
            made, _ = results[0][index]
            for x, y in zip(made, expected, strict=True):
                assert torch.equal(x, y), f"{count} ranks, {case}"
            _require_planned_traffic(case, [result[index][1] for result in results])


def test_a_clip_after_one_whose_second_text_did_not_fit_on_rank_0_is_that_of_one_rank(
    tmp_path: Path,
) -> None:
    """The others had that text, and took the next clip's for further ones of the failed clip."""
    torch.set_num_threads(1)
    splits = [{"guidance": 1, "sequence": 2}, {"guidance": 2, "sequence": 1}]
    function = "tests.parallel.transformers:clip_after_a_failed_text"
    made = run(function, tmp_path, [2], json.dumps(splits))[2][0]
    assert isinstance(made, list), made
    with torch.inference_mode():
        expected = make_clip(whole(CONFIG, "fp32"), CONFIG, 1)
    assert len(made) == len(splits)
    assert all(torch.equal(x, expected) for x in made)


def test_gathered_weights_of_a_text_that_do_not_fit_on_rank_0_end_the_run_on_all_ranks(
    tmp_path: Path,
) -> None:
    """The others wait in a gather: no smaller plan can begin there."""
    function = "tests.parallel.transformers:gathered_text_without_memory"
    first, second = run(function, tmp_path, [2])[2]
    assert first.startswith("RankFailed: rank 0 failed in the middle of a text: not enough for a")
    assert second.startswith("RankFailed: rank 0 failed: not enough for a slot")


def _require_planned_traffic(case: dict[str, Any], sent: list[dict[str, int]]) -> None:
    """Compare the bytes that all ranks sent for two clips with the closed form."""
    config = HIGHRES if case.get("highres") else CONFIG
    split, precision = Split(**case["split"]), case.get("precision", "fp32")
    low = 2 if precision == "bf16" else 4
    sizes = WITH_PICTURE if case.get("picture") else SIZES
    planned = step_traffic(config, split, sizes, passes=2, itemsize=low)
    steps = 2 * STAGE.steps

    def total(*kinds: str) -> int:
        return sum(counts.get(kind, 0) for counts in sent for kind in kinds)

    assert total("queries, keys, values", "results") == steps * planned.exchange
    assert total("latent", "velocities") == steps * planned.latents
    assert total("weights") == (_gathered(config, precision, split) if "gathered" in case else 0)


def _gathered(config: DitConfig, precision: Precision, split: Split) -> int:
    """Count the bytes of weights that all ranks send for two clips."""
    segments = segments_of(config, precision, LIMIT)
    runs = {}
    for name in ("block_in", "block_out", "text_keys_values"):
        inputs = segments[name].spec.inputs[-len(segments[name].weights) :]
        weights = [torch.empty(x.sized({}), dtype=DTYPES[x.dtype], device="meta") for x in inputs]
        runs[name] = packed_layout(weights, split.ranks).share * split.ranks
    passes = 2 // split.guidance
    shared = int(passes > 1)  # the second pass takes the first block's attention from the first
    steps, clips = 2 * STAGE.steps, 2
    # And at the end the block that would come next.
    before = steps * (passes * config.num_layers - shared) + 1
    after = steps * passes * config.num_layers + 1
    text = clips * 2 * config.num_layers
    size = before * runs["block_in"] + after * runs["block_out"] + text * runs["text_keys_values"]
    return (split.ranks - 1) * size
