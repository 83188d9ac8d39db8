# SPDX-License-Identifier: Apache-2.0
"""What a run tells: the seed it drew, the files it wrote, whole steps, sizes it has not learned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pw_bench.e2e.runtime_program import Silent
from pw_export.nano.train_draft import DIT
from pw_export.wan22_configs import NETWORKS
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.cli.trained_size import BUILT_IN, PUBLISHED, beyond_training, untrained
from pw_runtime.presets import find_preset
from pw_runtime.sizes import with_frames
from pw_runtime.system import progress
from pw_runtime.system.progress import Reporter, whole
from pw_runtime.types import DitConfig, Request
from tests.e2e.pw import Ended, Pw


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--prompt", "a cat", "--draft-only", *arguments,
        )  # fmt: skip

    return run


def test_a_drawn_seed_is_told_and_makes_the_clip_again(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = generate("--seed", "-1")
    assert ended.code == 0, ended.err
    found = re.search(r"seed (\d+) was drawn: --seed \1 makes", ended.err)
    assert found
    receipt = json.loads((tmp_path / "out" / "0.json").read_text(encoding="utf-8"))
    assert receipt["seeds"]["base"] == int(found[1])


def test_a_named_seed_is_not_told(generate: Callable[..., Ended]) -> None:
    assert "drawn" not in generate("--seed", "7").err


def test_the_contact_sheet_is_named(generate: Callable[..., Ended], tmp_path: Path) -> None:
    ended = generate("--contact-sheet")
    sheet = tmp_path / "out" / "contact_sheet.png"
    assert sheet.exists()
    assert f"contact sheet: {sheet}\n" in ended.err
    assert ended.out.split() == [str(tmp_path / "out" / "0.mp4")]


@pytest.mark.parametrize("name", ["2K", "2k", "Nano", "4K-5Step", "DRAFT"])
@pytest.mark.parametrize("option", ["--resolution", "--preset"])
def test_presets_are_named_in_any_case(pw: Pw, name: str, option: str) -> None:
    ended = pw("plan", option, name, "--host-memory", "4TiB", "--gpu-memory", "1TiB")
    assert ended.code == 0, ended.err


def test_a_preset_file_keeps_its_case(pw: Pw, tmp_path: Path) -> None:
    ended = pw("plan", "--preset", tmp_path / "Mine.TOML")
    assert "Mine.TOML" in ended.err


@pytest.mark.parametrize(
    ("parts", "expected"),
    [([], 0), ([0.5], 0), ([1 / 3] * 3, 1), ([0.1] * 10, 1), ([0.5, 0.5, 0.9], 1), ([1] * 3, 3)],
)
def test_parts_of_steps_are_no_steps(parts: list[float], expected: int) -> None:
    assert whole(sum(parts)) == expected


def test_lines_for_a_pipe_have_whole_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    with Reporter().steps("draft 0", 2) as advance:
        for _ in range(7):
            advance(2 / 7)
    lines = capsys.readouterr().err.splitlines()
    counts = [re.match(r"draft 0: (\S+)/2", line) for line in lines]
    assert all(count and count[1] in ("0", "1", "2") for count in counts)
    assert lines[-1].startswith("draft 0: 2/2 in ")


def test_a_measurement_prints_no_path_of_a_clip_that_is_gone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Silent(quiet=True).finished(Path("gone.mp4"))
    assert capsys.readouterr().out == ""


def request_for(name: str) -> Request:
    return Request(prompts=(), preset=find_preset(name), out=Path("out"), host_memory=2**50)


@pytest.fixture
def built_in(bundle_dir: Path) -> Bundle:
    """A bundle with the config of the built-in model."""
    bundle = open_bundle(bundle_dir)
    draft = replace(bundle.networks.draft, config=DIT)
    networks = replace(bundle.networks, draft=draft)
    return replace(bundle, manifest=replace(bundle.manifest, networks=networks))


@pytest.mark.parametrize("name", ["2k", "4k"])
def test_sizes_far_beyond_those_learned_are_told_with_their_time(
    built_in: Bundle, name: str
) -> None:
    warning = beyond_training(request_for(name), built_in)
    assert warning is not None
    assert "has learned 256x128" in warning
    assert re.search(r"takes about [\d.]+ (min|hours)", warning)


def test_its_own_sizes_and_other_models_are_not_warned_of(
    built_in: Bundle, bundle_dir: Path
) -> None:
    for name in ("nano", "nano-hd", "nano-portrait", "nano-square"):
        assert beyond_training(request_for(name), built_in) is None
    assert beyond_training(request_for("4k"), open_bundle(bundle_dir)) is None


def test_networks_are_recognised_by_their_widths() -> None:
    for config, widths in ((NETWORKS.draft.config, PUBLISHED), (DIT, BUILT_IN)):
        assert isinstance(config, DitConfig)
        assert (config.dim, config.ffn_dim, config.num_layers) == widths


@pytest.mark.parametrize("name", ["draft", "2k", "4k", "4k-5step"])
def test_sizes_of_the_training_are_not_warned_of(name: str) -> None:
    assert untrained(NETWORKS.draft.config, find_preset(name), draft_only=False) is None
    assert untrained(NETWORKS.draft.config, find_preset(name), draft_only=True) is None


def test_other_shapes_and_lengths_are_told_with_those_of_the_training() -> None:
    config, portrait = NETWORKS.draft.config, find_preset("2k-portrait")
    assert untrained(config, portrait, draft_only=False) == (
        "warning: a clip of 1440x2560 with 121 frames, from a draft of 256x448, is not what the "
        "published networks were trained on (drafts of 448x256, clips of 2560x1440 and 3840x2144, "
        "121 frames): how good it looks is not known"
    )
    warning = untrained(config, portrait, draft_only=True)
    assert warning is not None
    assert "a clip of 256x448 with 121 frames is not" in warning
    warning = untrained(config, with_frames(find_preset("4k"), 1), draft_only=False)
    assert warning is not None
    assert "a clip of 3840x2144 with 1 frame, from a draft of 448x256, is not" in warning


def test_a_plan_says_that_a_size_was_not_trained(pw: Pw) -> None:
    memory = ("--gpu-memory", "24GiB", "--host-memory", "64GiB")
    told = pw("plan", "--preset", "2k", "--size", "1440x2560", *memory)
    assert "121 frames of 1440x2560" in told.out
    assert "from a draft of 256x448, is not what the published networks were" in told.out
    document = json.loads(pw("plan", "--preset", "2k-portrait", *memory, "--json").out)
    assert document["warning"].startswith("warning: a clip of 1440x2560")
    assert json.loads(pw("plan", "--preset", "2k", *memory, "--json").out)["warning"] is None
