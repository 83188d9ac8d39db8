# SPDX-License-Identifier: Apache-2.0
"""`pw bench quality`: what it counts, what it disables in the network, what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from pw_bench.quality import run
from pw_bench.quality.gate import shares
from pw_bench.quality.plots import bars
from pw_bench.quality.render import Renderer, examples, load_renderer
from pw_bench.result_sections import Attributes, Quality, Variant
from pw_bench.results import read_result
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.cli.bench import bench
from pw_runtime.presets import PRESETS
from pw_runtime.types import Preset, VideoConfig

NANO = PRESETS["nano"]


@pytest.fixture(scope="module")
def renderer(bundle_dir: Path) -> Renderer:
    return load_renderer(open_bundle(bundle_dir))


@pytest.fixture(scope="module")
def small() -> Preset:
    assert NANO.highres is not None
    return replace(
        NANO,
        draft=replace(NANO.draft, width=64, height=32, steps=1),
        highres=replace(NANO.highres, width=128, height=64),
        video=VideoConfig(frames=5),
    )


@pytest.fixture(scope="module")
def folder(bundle_dir: Path, small: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command for one caption and one scene; return the folder of its files."""
    folder = tmp_path_factory.mktemp("quality")
    arguments = ["quality", "--model", str(bundle_dir), *["--captions", "1", "--clips", "1"]]
    for option, name in (("--out", "r.json"), ("--plot", "bars.svg"), ("--sheet", "sheet.png")):
        arguments += [option, str(folder / name)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "find_preset", lambda name: small)
        ran = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return folder


@pytest.fixture
def quality(folder: Path) -> Quality:
    measured = read_result(folder / "r.json").quality
    assert measured is not None
    return measured


def test_shares_count_the_captions_that_came_true() -> None:
    scenes = [example.scene for example in examples(4)]
    seen = [Attributes(scene.colour, scene.shape, scene.motion) for scene in scenes]
    seen[0] = replace(seen[0], shape=None)
    seen[1] = replace(seen[1], motion=None, shape=None)
    assert shares(seen, scenes) == {"colour": 1.0, "shape": 0.5, "motion": 0.75}


def test_every_variant_makes_every_clip_and_true_ones_are_classified_correctly(
    quality: Quality,
) -> None:
    names = ["true renderings", "draft", "4 steps", "1 step", "2 steps", "8 steps"]
    assert [variant.name for variant in quality.variants] == [*names, "no dt", "no adapter"]
    assert quality.variants[0].adherence == {"colour": 1.0, "shape": 1.0, "motion": 1.0}
    assert quality.variants[0].seen == quality.expected
    assert all(len(variant.seen) == 1 for variant in quality.variants)


def test_the_usual_clips_alone_are_made_on_demand(
    bundle_dir: Path, small: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_preset", lambda name: small)
    measured = run.measure_quality(
        bundle_dir, "nano", captions=1, clips=1, sheet=None, usual_only=True
    ).quality
    assert measured is not None
    assert [x.name for x in measured.variants] == ["true renderings", "draft", "4 steps"]
    assert [x.name for x in measured.from_true_drafts] == ["draft enlarged", "4 steps"]
    assert measured.fewer_steps == ()


def test_network_without_its_adapter_or_step_size_makes_another_clip(
    renderer: Renderer, small: Preset
) -> None:
    (example,) = examples(1)
    with torch.inference_mode():
        low = renderer.draft_latent(example, small)
        nets = (renderer.highres, renderer.highres, renderer.no_dt, renderer.no_adapter)
        clips = [renderer.highres_latent(example, low, small, net, 2).x for net in nets]
        other = renderer.highres_latent(
            example, replace(low, x=-low.x), small, renderer.no_adapter, 2
        ).x
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[0], clips[3])
    assert torch.equal(clips[3], other)  # it does not see the draft


def test_clips_with_a_ground_truth_are_compared_with_it(quality: Quality) -> None:
    through, highres = quality.reconstruction, quality.from_true_drafts
    assert [likeness.name for likeness in through] == ["64x32", "128x64"]
    assert [likeness.name for likeness in highres][:2] == ["draft enlarged", "4 steps"]
    assert all(len(same.psnr) == len(same.ssim) == 1 for same in (*through, *highres))


def test_clips_in_few_steps_are_compared_with_those_in_many(quality: Quality) -> None:
    names = [
        f"{n}{end}"
        for end in ("", ", no dt")
        for n in ("1 step", *map("{} steps".format, (2, 4, 8)))
    ]
    assert [likeness.name for likeness in quality.fewer_steps] == names
    near = {likeness.name: likeness.mean_psnr for likeness in quality.fewer_steps}
    assert near["1 step"] < near["8 steps"] < 100
    assert near["1 step"] != near["1 step, no dt"]


def test_every_object_of_hard_captions_is_looked_for(quality: Quality) -> None:
    groups = [(x.group, x.variant, x.captions) for x in quality.hard_captions]
    variants = ("true renderings", "draft", "4 steps")
    assert groups == [(group, name, 1) for group in ("tiny", "pairs") for name in variants]
    for x in quality.hard_captions:
        if x.variant == "true renderings":
            assert set(x.shares.values()) == {1.0}


def test_sheets_and_bars_are_written_beside_the_result(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert names == {"r.json", "bars.svg", "sheet.png", "sheet-true.png"}


def test_bars_show_every_share() -> None:
    share = {"colour": 1.0, "shape": 0.25, "motion": 0.5}
    variants = [
        Variant(name=name, adherence=share, sharpness=2.0, seen=())
        for name in ("true renderings", "b")
    ]
    picture = ElementTree.fromstring(bars(variants))
    words = ["".join(e.itertext()) for e in picture.iter() if e.tag.endswith("text")]
    assert words.count("25%") == words.count("100%") == 2
