# SPDX-License-Identifier: Apache-2.0
"""A decode divided among ranks: the bits of one process, and no message is ever left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pw_runtime.errors import BadResult
from pw_runtime.models.tiling import band_rects, make_bands
from pw_runtime.planning.decode_memory import SEAMS, waiting_sizes
from tests.networks import TINY_VAE
from tests.parallel.decodes import CASES, FAULTY, TAKEN
from tests.parallel.ranks import run

NAN = "a decoded frame contains NaN or infinity"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """What one to four ranks found out about CASES."""
    folder = tmp_path_factory.mktemp("clips")
    return run("tests.parallel.decodes:whole_clips", folder, [1, 2, 3, 4])


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_bits_of_one(clips) -> None:
    """Bands and strips, both pixel formats; fewer tiles than ranks, and runs of unequal length."""
    for count, results in clips.items():
        for case, (bits, counted, _), one in zip(CASES, results[0], clips[1][0], strict=True):
            assert bits == one[0], (count, case)
            assert len(bits) == case.frames
            if count > 1:
                assert counted == [1, *[4] * (case.frames - 1)]
        for rank, followers in enumerate(results[1:], start=1):
            for case, (bits, counted, sent) in zip(CASES, followers, strict=True):
                assert not bits
                assert not counted
                assert ("pixels" in sent) == (rank < case.strips), (count, rank, case)


@pytest.mark.slow
def test_a_rank_sends_the_rows_that_the_closed_form_counts(clips) -> None:
    """And pixels, once: with a byte for each latent frame."""
    results = clips[3]
    for index, case in enumerate(CASES):
        if case.on == "engines" or case.strips < 3:
            continue
        bands = [rows.stop - rows.start for rows in make_bands(case.rows, case.strips, TINY_VAE)]
        itemsize = 2 if case.on == "bf16" else 4
        sizes = waiting_sizes(TINY_VAE, case.frames, case.rows, case.columns, bands, itemsize)
        sent = [result[index][2] for result in results]
        for rank in (0, 1):
            assert sent[rank]["seam"] == sum(sizes[SEAMS])
        assert "seam" not in sent[2]
        first = band_rects(make_bands(case.rows, case.strips, TINY_VAE), case.columns, TINY_VAE)
        rows = sum(rect.height for rect in first[: -(-case.strips // 3)])  # of rank 0
        left = (case.rows * 16 - rows) * case.columns * 16 * (4 * case.frames - 3)
        pixels = sum(sent[rank]["pixels"] - case.frames for rank in (1, 2))
        assert pixels == (3 * left if case.pixels == "rgb24" else left * 3 // 2)


@pytest.mark.slow
def test_a_failure_on_any_rank_is_that_of_the_clip_alone(tmp_path: Path) -> None:
    """It is told by rank 0 as if it were its own, and the ranks decode the next clip."""
    results = run("tests.parallel.decodes:faults", tmp_path, [4])[4]
    assert len(results[0]) == 4 * 4
    for fault, rank, at, kind, text in results[0]:
        assert kind is BadResult, (fault, rank, at, text)
        if fault == "not_a_number":
            assert text.startswith(NAN)
        else:
            assert text.startswith("out of memory"), text
    for follower in results[1:]:
        assert all(text == "None" for *_, text in follower)


def test_a_rank_without_memory_for_rows_takes_them_later(tmp_path: Path) -> None:
    """What it is sent is in step again when the clip ends."""
    results = run("tests.parallel.decodes:no_room_for_rows", tmp_path, [2])[2]
    assert results == [("rank 1: CUDA out of memory", False), (None, True)]


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    results = run("tests.parallel.decodes:bad_weights", tmp_path, [2])[2]
    assert "decoder.head.2.bias" in results[0]
    assert results[1] is None


@pytest.mark.slow
def test_ranks_return_when_a_decode_is_closed_early(tmp_path: Path) -> None:
    """Rank 0 is ahead of its frames by one, for four other ranks or fewer."""
    results = run("tests.parallel.decodes:closed_early", tmp_path, [2, 4])
    for count, (computed, *_) in results.items():
        bands = FAULTY.strips // count
        assert computed == [bands * min(n + 1, FAULTY.frames) for n in TAKEN]


def test_ranks_are_at_the_same_frame(tmp_path: Path) -> None:
    """A band goes on with rows that the one above it, which is not finished, has kept."""
    assert run("tests.parallel.decodes:side_by_side", tmp_path, [4])[4] == [True, 1, 2, 3]


@pytest.mark.slow
def test_a_rank_that_dies_in_the_middle_ends_the_others(tmp_path: Path) -> None:
    results = run("tests.parallel.decodes:lost", tmp_path, [3])[3]
    for text in results[:2]:
        assert text.startswith("RankFailed: rank 2 was killed, or ended without a word")


def test_ranks_that_divide_a_clip_differently_notice(tmp_path: Path) -> None:
    results = run("tests.parallel.decodes:different", tmp_path, [2])[2]
    text = "rank 0 decodes for tile 2 of frame 0, expected 3 of frame 0"
    assert results[1].startswith(f"ValueError: {text}")
    assert results[0].startswith(f"RankFailed: rank 1 failed: {text}")


def test_official_strips_and_the_order_of_tiles_are_for_one_rank(tmp_path: Path) -> None:
    for said in run("tests.parallel.decodes:refused", tmp_path, [2])[2]:
        assert said == [
            "official strips are decoded by one rank, got several",
            "decoding tile by tile takes one rank, got several",
        ]


def test_tensors_arrive_with_their_strides(tmp_path: Path) -> None:
    refused, (*arrived, told) = run("tests.parallel.decodes:tensors", tmp_path, [2])[2]
    assert arrived == [True] * 5
    assert told.startswith("rows of rank 0: expected the layout of a tensor, got 1 dimensions")
    assert refused.startswith("rows: a tensor with gaps")
