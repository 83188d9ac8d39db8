# SPDX-License-Identifier: Apache-2.0
"""What the quality gate counts, what it leaves out of the network, and what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pw_bench.quality.gate import Way, adherence, from_true_drafts, reconstruction, shares
from pw_bench.quality.measure import Seen
from pw_bench.quality.plots import bars, table, write_sheets
from pw_bench.quality.render import Studio, examples, open_studio
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.presets import PRESETS
from pw_runtime.types import Preset, VideoConfig

NANO = PRESETS["nano"]


@pytest.fixture(scope="module")
def studio(bundle_dir: Path) -> Studio:
    return open_studio(open_bundle(bundle_dir))


@pytest.fixture(scope="module")
def small() -> Preset:
    assert NANO.highres is not None
    return replace(
        NANO,
        draft=replace(NANO.draft, width=64, height=32, steps=1),
        highres=replace(NANO.highres, width=128, height=64),
        video=VideoConfig(frames=5),
    )


def test_shares_count_the_captions_that_came_true() -> None:
    scenes = [example.scene for example in examples(4)]
    seen = [Seen(scene.colour, scene.shape, scene.motion) for scene in scenes]
    seen[0] = replace(seen[0], shape=None)
    seen[1] = replace(seen[1], motion=None, shape=None)
    assert shares(seen, scenes) == {"colour": 1.0, "shape": 0.5, "motion": 0.75}


def test_every_way_makes_every_clip_and_true_ones_are_read_right(
    studio: Studio, small: Preset
) -> None:
    with torch.inference_mode():
        ways = adherence(studio, small, examples(2))
    names = ["true renderings", "draft", "4 steps", "1 step", "2 steps", "8 steps"]
    assert [way.name for way in ways] == [*names, "no dt", "no adapter"]
    assert ways[0].adherence == {"colour": 1.0, "shape": 1.0, "motion": 1.0}
    assert all(len(way.seen) == 2 for way in ways)


def test_a_network_without_its_adapter_or_its_step_size_paints_otherwise(
    studio: Studio, small: Preset
) -> None:
    (example,) = examples(1)
    with torch.inference_mode():
        low = studio.draft_of(example, small)
        nets = (studio.highres, studio.highres, studio.no_step, studio.no_adapter)
        clips = [studio.paint(example, low, small, net, 2).x for net in nets]
        other = studio.paint(example, replace(low, x=-low.x), small, studio.no_adapter, 2).x
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[0], clips[3])
    assert torch.equal(clips[3], other)  # it does not see the draft


def test_clips_with_a_truth_are_held_against_it(studio: Studio, small: Preset) -> None:
    with torch.inference_mode():
        through = reconstruction(studio, small, 2)
        painted = from_true_drafts(studio, small, 2)
    assert [one.name for one in through] == ["64x32", "128x64"]
    assert [one.name for one in painted][:2] == ["draft enlarged", "4 steps"]
    assert all(len(one.psnr) == len(one.ssim) == 2 for one in (*through, *painted))


def test_sheets_show_eight_captions_and_bars_every_share(
    studio: Studio, small: Preset, tmp_path: Path
) -> None:
    with torch.inference_mode():
        write_sheets(studio, small, examples(2), tmp_path / "sheet.png")
    assert {file.name for file in tmp_path.iterdir()} == {"sheet.png", "sheet-true.png"}
    share = {"colour": 1.0, "shape": 0.25, "motion": 0.5}
    ways = [
        Way(name=name, adherence=share, sharpness=2.0, seen=()) for name in ("true renderings", "b")
    ]
    picture = ElementTree.fromstring(bars(ways))
    words = ["".join(one.itertext()) for one in picture.iter() if one.tag.endswith("text")]
    assert words.count("25%") == words.count("100%") == 2
    assert "| b | 100% | 25% | 50% | 1.00 |" in table(ways)
