# SPDX-License-Identifier: Apache-2.0
"""Sizes of clips: the official rule for pictures, drafts of the clip's shape, bad numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.presets import PRESETS, check_preset, find_preset
from pw_runtime.sizes import Size, best_size, sized, with_frames

TWO_K, DRAFT = 2560 * 1440, 448 * 256


@pytest.mark.parametrize(
    ("picture", "area", "size"),
    [
        ((2560, 1440), TWO_K, (2560, 1440)),
        ((1440, 2560), TWO_K, (1440, 2560)),
        ((4000, 4000), TWO_K, (1920, 1920)),
        ((3000, 2000), TWO_K, (2336, 1568)),
        ((1280, 704), TWO_K, (2592, 1408)),
        ((2560, 1440), DRAFT, (448, 256)),
        ((1920, 1920), DRAFT, (352, 320)),  # as near as 320x352: by height
        ((3000, 2000), DRAFT, (384, 288)),
        ((2000, 3000), DRAFT, (288, 384)),
        ((1280, 704), 1280 * 704, (1280, 704)),
    ],
)
def test_a_picture_gets_the_size_of_the_official_rule(picture: Size, area: int, size: Size) -> None:
    """Literal values, worked out by the rule of Wan2.2's image-to-video."""
    assert best_size(*picture, area) == size


def test_no_other_rounding_of_one_side_is_nearer_to_the_picture() -> None:
    for width in range(100, 4000, 173):
        for height in range(100, 4000, 191):
            if max(width, height) > 8 * min(width, height):
                continue
            found, ratio = best_size(width, height, TWO_K), width / height
            assert found[0] % 32 == found[1] % 32 == 0
            assert found[0] * found[1] <= TWO_K
            ideal = (TWO_K * ratio) ** 0.5
            first = int(ideal // 32 * 32)
            second = int(TWO_K / ideal // 32 * 32)
            ways = [(first, TWO_K // first // 32 * 32), (TWO_K // second // 32 * 32, second)]
            assert found in ways
            assert apart(found, ratio) == min(apart(way, ratio) for way in ways)


def apart(size: Size, ratio: float) -> float:
    return max(size[0] / size[1] / ratio, ratio / (size[0] / size[1]))


def test_a_picture_too_long_for_the_area_is_refused() -> None:
    with pytest.raises(BadRequest, match="a picture of 10000x20 is too long"):
        best_size(10_000, 20, DRAFT)


@pytest.mark.parametrize(
    ("size", "draft"),
    [
        ((2560, 1440), (448, 256)),
        ((3840, 2144), (448, 256)),
        ((1440, 2560), (256, 448)),
        ((1920, 1920), (352, 352)),
        ((2336, 1568), (384, 256)),
        ((1920, 1440), (384, 288)),
    ],
)
def test_a_draft_has_the_shape_of_its_clip(size: Size, draft: Size) -> None:
    """The trained one where it fits; the official rule would stretch a 2:3 draft by 12 %."""
    preset = sized(find_preset("2k"), size)
    assert preset.highres is not None
    assert (preset.highres.width, preset.highres.height) == size
    assert (preset.draft.width, preset.draft.height) == draft
    assert apart(draft, size[0] / size[1]) < 1.03


def test_everything_but_the_sizes_stays() -> None:
    before = find_preset("4k")
    after = sized(before, (2144, 3840))
    assert before.highres is not None
    assert after == replace(
        before,
        draft=replace(before.draft, width=256, height=448),
        highres=replace(before.highres, width=2144, height=3840),
    )
    assert after == PRESETS["4k-portrait"]
    assert sized(before, (3840, 2144)) == before
    draft = sized(find_preset("draft"), (320, 320))
    assert (draft.draft.width, draft.draft.height, draft.highres) == (320, 320, None)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 32768), (32768, 64), (32, 3840)])
def test_the_smallest_and_the_longest_sizes_pass_the_check_of_presets(size: Size) -> None:
    check_preset(sized(find_preset("4k"), size), "4k")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((1400, 2560), "a width of 1376 or 1408 and a height of 2560"),
        ((1440, 2550), "give for instance --size 1440x2560"),
        ((0, 32), "a width of 32 and a height of 32"),
        ((40_000, 64), "a width of 32768 and a height of 64"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_nearest(size: Size, said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        sized(find_preset("2k"), size)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("frames", "said"),
    [(120, "117 or 121"), (2, "1 or 5"), (0, "1: 4n+1"), (-7, "1: 4n+1"), (9999, "4093: 4n+1")],
)
def test_a_length_that_cannot_be_is_refused_with_the_nearest(frames: int, said: str) -> None:
    assert with_frames(find_preset("2k"), 5).video.frames == 5
    with pytest.raises(BadRequest) as refused:
        with_frames(find_preset("2k"), frames)
    assert said in str(refused.value)
