# SPDX-License-Identifier: Apache-2.0
"""Scenes are the same every time, show what their captions say, and the measurement sees it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from pw_bench.quality.measure import classify, matches, psnr, sharpness, ssim
from pw_export.nano.captions import WORDS, caption, make_tokenizer
from pw_export.nano.data import TEXT_LEN, tokens, training_scenes
from pw_export.nano.scenes import Scene, Window, draw_scene, render
from pw_runtime.types import OFFICIAL_NEGATIVE


def held_out_scenes(count: int) -> list[Scene]:
    scenes = (draw_scene(number) for number in range(10**6, 2 * 10**6))
    found = (scene for scene in scenes if scene.held_out)
    return [next(found) for _ in range(count)]


def test_a_number_gives_the_same_clip_every_time() -> None:
    one, two = (render(draw_scene(5), 64, 32, 5) for _ in range(2))
    assert torch.equal(one, two)
    assert draw_scene(5) != draw_scene(6)


def test_a_window_is_a_part_of_the_whole_picture() -> None:
    whole = render(draw_scene(7), 128, 64, 5)
    part = render(draw_scene(7), 128, 64, 5, window=Window(left=48, top=16, width=32, height=32))
    assert torch.equal(part, whole[:, :, 16:48, 48:80])


def test_a_larger_picture_shows_the_same_with_sharper_edges() -> None:
    small, large = (render(draw_scene(3), 64 * n, 32 * n, 5) for n in (1, 4))
    shrunk = F.avg_pool2d(large.transpose(0, 1), 4).transpose(0, 1)
    assert psnr(shrunk, small) > 25
    grown = F.interpolate(small.transpose(0, 1), scale_factor=4, mode="bilinear").transpose(0, 1)
    assert sharpness(large) > 1.5 * sharpness(grown)


def test_no_training_scene_has_a_held_out_combination() -> None:
    def said(scene: Scene) -> tuple[str, ...]:
        return scene.colour, scene.shape, scene.motion, scene.background

    kept = {said(scene) for scene in held_out_scenes(64)}
    assert not kept & {said(scene) for scene in training_scenes(500)}


@pytest.mark.parametrize("size", [(128, 64), (256, 128)])
def test_measurement_reads_true_scenes_without_a_mistake(size: tuple[int, int]) -> None:
    for scene in held_out_scenes(12):
        assert matches(classify(render(scene, *size, 9)), scene) == {
            "colour": True,
            "shape": True,
            "motion": True,
        }


def test_measurement_sees_nothing_in_a_landscape_alone() -> None:
    grey = torch.full((3, 5, 32, 64), 0.1)
    assert classify(grey).colour is None


def test_similarity_falls_with_noise_and_is_one_without() -> None:
    clip = render(draw_scene(1), 64, 32, 5)
    noisy = clip + 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert ssim(clip, clip) == pytest.approx(1)
    assert ssim(clip, noisy) < 0.9
    assert psnr(clip, noisy) == pytest.approx(26, abs=0.3)  # 10 log10(4 / 0.01)


def test_every_caption_is_known_to_the_tokenizer_and_fits() -> None:
    tokenizer, draw = make_tokenizer(), random.Random(0)
    unknown = tokenizer.token_to_id("<unk>")
    for number in range(200):
        scene = draw_scene(number)
        text = caption(scene, draw)
        ids = tokenizer.encode(text).ids
        assert unknown not in ids
        assert len(ids) <= TEXT_LEN
        assert any(way in text for way in WORDS[scene.motion])


def test_a_text_in_other_words_becomes_unknown_words() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.encode("A RED fox!").tokens == ["a", "red", "<unk>", "</s>"]
    assert tokenizer.encode(OFFICIAL_NEGATIVE).tokens == ["jpeg", "</s>"]


def test_token_batches_are_padded_and_masked() -> None:
    ids, mask = tokens(make_tokenizer(), ["a red ball", ""])
    assert ids.shape == mask.shape == (2, TEXT_LEN)
    assert mask.sum(1).tolist() == [4, 1]
    assert not ids[mask == 0].any()
