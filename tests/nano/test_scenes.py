# SPDX-License-Identifier: Apache-2.0
"""Scenes are the same every time, show what their captions say, and the measurement sees it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pw_bench.quality.gate import found_shares
from pw_bench.quality.measure import classify, classify_each, matches, psnr, sharpness, ssim
from pw_bench.quality.render import HARD, examples
from pw_export.nano.captions import LATER, WORDS, caption, make_tokenizer, vocabulary
from pw_export.nano.data import TEXT_LEN, draw_indices, odds, tokens, training_scenes
from pw_export.nano.scenes import SQUARE, TALL, WIDE, Scene, Window, draw_scene, render
from pw_runtime.types import OFFICIAL_NEGATIVE


def held_out_scenes(count: int) -> list[Scene]:
    scenes = (draw_scene(number) for number in range(10**6, 2 * 10**6))
    held_out = (scene for scene in scenes if scene.held_out)
    return [next(held_out) for _ in range(count)]


def test_a_number_gives_the_same_clip_every_time() -> None:
    first, second = (render(draw_scene(5), 64, 32, 5) for _ in range(2))
    assert torch.equal(first, second)
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


@pytest.mark.parametrize(
    ("aspect", "size"), [(WIDE, (64, 32)), (SQUARE, (48, 48)), (TALL, (32, 64))]
)
def test_shapes_are_inside_the_picture_at_half_time(aspect: float, size: tuple[int, int]) -> None:
    for number in range(60):
        scene = draw_scene(number, varied=True, aspect=aspect)
        for shape in (scene, scene.other):
            if shape is not None:
                assert shape.radius < shape.x < scene.width - shape.radius
                assert shape.radius < shape.y < scene.height - shape.radius
        assert render(scene, *size, 5).shape == (3, 5, size[1], size[0])


def test_a_circle_is_round_in_every_aspect() -> None:
    for aspect, size in ((WIDE, (64, 32)), (SQUARE, (48, 48)), (TALL, (32, 64))):
        numbers = (draw_scene(number, aspect=aspect) for number in range(100))
        circle = next(scene for scene in numbers if scene.shape == "circle")
        still = replace(circle, camera="still", dx=0.0, dy=0.0)
        picture = render(still, *size, 1)[:, 0]
        mask = picture.amax(0) - picture.amin(0) > 0.9
        assert abs(int(mask.any(0).sum()) - int(mask.any(1).sum())) <= 1


def test_varied_scenes_have_tiny_shapes_and_pairs_that_never_overlap() -> None:
    scenes = [draw_scene(number, varied=True) for number in range(200)]
    assert {scene.size for scene in scenes} == {"tiny", "small", "big"}
    pairs = [(scene, scene.other) for scene in scenes if scene.other is not None]
    assert 0.1 < len(pairs) / len(scenes) < 0.3
    for first, second in pairs:
        assert first.colour != second.colour
        assert max(abs(first.x - second.x), abs(first.y - second.y)) > first.radius + second.radius


def test_a_caption_of_a_pair_names_both_shapes() -> None:
    scene = next(s for s in (draw_scene(n, varied=True) for n in range(50)) if s.other is not None)
    assert scene.other is not None
    text = caption(scene, random.Random(0))
    subjects = text.split(" and ")
    assert len(subjects) == 2
    for shape, subject in zip((scene, scene.other), subjects, strict=True):
        assert any(way in subject for way in WORDS[shape.colour])
        assert any(way in subject for way in WORDS[shape.motion])


def test_words_of_the_first_version_keep_their_tokens() -> None:
    words = vocabulary()
    first = words[: -len(LATER)]
    assert first == sorted(first)
    assert len(first) == 78  # as many as its table of the first version has, without special tokens


def test_no_training_scene_has_a_held_out_combination() -> None:
    def attributes(scene: Scene) -> tuple[str, ...]:
        return scene.colour, scene.shape, scene.motion, scene.background

    kept = {attributes(scene) for scene in held_out_scenes(64)}
    assert not kept & {attributes(scene) for scene in training_scenes(500)}


@pytest.mark.parametrize("size", [(128, 64), (256, 128)])
def test_measurement_reads_true_scenes_without_a_mistake(size: tuple[int, int]) -> None:
    for scene in held_out_scenes(12):
        assert matches(classify(render(scene, *size, 9)), scene) == {
            "colour": True,
            "shape": True,
            "motion": True,
        }


@pytest.mark.parametrize("group", HARD)
def test_measurement_finds_every_object_of_hard_captions_and_no_other(group: str) -> None:
    scenes = [example.scene for example in examples(12, group)]
    seen = [classify_each(render(scene, 256, 128, 9)) for scene in scenes]
    everything = dict.fromkeys(("present", "shape", "motion", "clip"), 1.0)
    assert found_shares(seen, scenes) == everything
    colour, attributes = next(iter(seen[0].items()))
    seen[0] = seen[0] | {colour: replace(attributes, shape=None)}
    shares = found_shares(seen, scenes)
    assert shares["shape"] < 1 == shares["motion"]
    assert shares["clip"] == pytest.approx(11 / 12)
    del seen[0][colour]
    assert found_shares(seen, scenes)["present"] == shares["shape"]


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
        scene = draw_scene(number, varied=True)
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


def test_small_squares_are_seen_twice_as_often_as_other_scenes() -> None:
    scenes = [draw_scene(number, varied=True) for number in range(300)]
    drawn = draw_indices(odds(scenes), 60_000, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=len(scenes)).float()
    small = torch.tensor([s.shape == "square" and s.size != "big" for s in scenes])
    assert counts.min() > 0
    assert counts[small].mean() / counts[~small].mean() == pytest.approx(2, abs=0.1)
