# SPDX-License-Identifier: Apache-2.0
"""Presets, preset files and prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.presets import PRESETS, check_preset, find_preset
from pw_runtime.prompts import make_prompts, read_prompts
from pw_runtime.sampling.noise import latent_shape, resolve_base_seed
from tests.e2e.pw import write_preset


@pytest.mark.parametrize(
    ("name", "size", "steps", "shift", "latent"),
    [
        ("2k", (2560, 1440), 4, 5.5, (48, 31, 90, 160)),
        ("4k", (3840, 2144), 4, 5.8, (48, 31, 134, 240)),
        ("4k-5step", (3840, 2144), 5, 5.8, (48, 31, 134, 240)),
    ],
)
def test_presets_hold_the_published_numbers(name, size, steps, shift, latent) -> None:
    preset = find_preset(name)
    assert preset.highres is not None
    assert (preset.highres.width, preset.highres.height) == size
    assert (preset.highres.steps, preset.highres.shift, preset.highres.guidance) == (
        steps, shift, 5.0,
    )  # fmt: skip
    assert latent_shape(preset.highres, preset.video) == latent
    draft = preset.draft
    assert (draft.width, draft.height, draft.steps, draft.shift) == (448, 256, 50, 5.0)
    assert latent_shape(draft, preset.video) == (48, 31, 16, 28)


def test_every_built_in_preset_passes_the_check_of_files() -> None:
    for name, preset in PRESETS.items():
        check_preset(preset, name)


def test_compat_switches_are_off_and_tiling_exact_everywhere() -> None:
    for preset in PRESETS.values():
        assert not preset.compat.bf16_einsum
        assert not preset.compat.bf16_timesteps
        assert not preset.compat.truncating_uint8
        assert preset.decode.tiling == "exact"


def test_preset_file_is_read_key_by_key(tmp_path: Path) -> None:
    preset = find_preset(str(write_preset(tmp_path / "p.toml", tiling="official", strips=3)))
    assert preset.highres is not None
    assert (preset.draft.width, preset.highres.guidance) == (96, 4.0)
    assert (preset.decode.tiling, preset.decode.strips) == ("official", 3)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("width = 96", "widht = 96", "draft.widht"),
        ("[video]", "[movie]", "movie"),
        ("truncating_uint8", "truncate", "compat.truncate"),
        ('solver = "unipc"', 'solver = "euler"', "solver"),
        ("height = 64", "height = 65", "draft.height is 65"),
        ("width = 192", "width = 200", "highres.width is 200"),
        ("frames = 5", "frames = 6", "video.frames is 6, wanted 4n+1, for instance 5"),
        ("frames = 5", 'frames = "5"', "video.frames"),
        ("steps = 2", "steps = 0", "steps is 0"),
        ("strips = 1", "strips = 13", "decode.strips is 13, wanted 1 to 12"),
        ("[draft]", "[draft", "not a TOML file"),
        ("guidance = 5.0", "guidance = nan", "draft.guidance is nan"),
        ("shift = 5.0", "shift = 1e-300", "draft.shift is 1e-300"),
        ("width = 96", "width = 3200000000", "draft.width is 3200000000"),
        ("steps = 2", "steps = 1" + "0" * 5000, "line 4 has 5009 characters"),
        ("fps = 24\n", "", None),
    ],
)
def test_preset_file_faults_name_the_key(tmp_path: Path, old, new, named) -> None:
    file = write_preset(tmp_path / "p.toml")
    file.write_text(file.read_text().replace(old, new))
    if named is None:  # fps has a default
        assert find_preset(str(file)).video.fps == 24
        return
    with pytest.raises(BadRequest) as error:
        find_preset(str(file))
    assert named in str(error.value)


def test_text_prompts_take_their_line_number_as_id(tmp_path: Path) -> None:
    """0-based and counted with the blank lines, as the official reader does."""
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\n\r\n  a dog  \n")
    prompts = read_prompts(tmp_path / "p.txt")
    assert [(p.id, p.text, p.position) for p in prompts] == [("0", "a cat", 1), ("2", "a dog", 2)]


def test_json_lines_are_recognised_by_content(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"prompt_id": "x", "prompt": "a cat"}\n{"caption": "b"}\n')
    prompts = read_prompts(tmp_path / "p.txt")
    assert [(p.id, p.text) for p in prompts] == [("x", "a cat"), ("1", "b")]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "x"}',
        '{"text": ""}',
        '{"text": 3}',
        '["a cat"]',
        '"a cat"',
        "[" * 100_000,
        '{"id": null, "text": "a"}',
        '{"id": ["a"], "text": "a"}',
        '{"id": 1%s, "text": "a"}' % ("0" * 5000),
    ],
)
def test_json_line_without_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(BadRequest, match="line 1"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("prompt_id", ["", ".", "..", "a/b", "a\\b", "a\n", "字" * 90, "a\ud800"])
def test_ids_that_cannot_name_a_file_are_refused(prompt_id: str) -> None:
    """Seen: an id of 270 bytes ended the whole run with a traceback."""
    with pytest.raises(BadRequest, match="cannot name a file"):
        make_prompts([(prompt_id, "a cat")])


def test_text_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(BadRequest, match="not text"):
        make_prompts([("0", "a cat \ud800")])


def test_seeds_that_no_generator_takes_are_refused() -> None:
    with pytest.raises(BadRequest, match="too large"):
        resolve_base_seed(10**22)
    assert 0 <= resolve_base_seed(-1) < 2**31
    assert resolve_base_seed(7) == 7


def test_preset_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = write_preset(tmp_path / "p.toml")
    file.write_text("\ufeff" + file.read_text())
    assert find_preset(str(file)).draft.width == 96


def test_a_preset_with_the_earlier_key_is_told_the_new_one(tmp_path: Path) -> None:
    file = write_preset(tmp_path / "p.toml")
    text = file.read_text()
    assert "[decode]\n" in text
    file.write_text(text.replace("[decode]\n", '[decode]\ncaches = "host"\n'))
    with pytest.raises(BadRequest, match=r"decode\.caches") as refused:
        find_preset(str(file))
    assert 'in place of caches = "host" write order = "tiles"' in str(refused.value)
