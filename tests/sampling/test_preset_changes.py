# SPDX-License-Identifier: Apache-2.0
"""Single keys of a preset with other values, and the name that says so."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.presets import KEYS, PRESETS, find_preset, preset_name
from pw_runtime.sizes import sized, with_frames
from tests.e2e.pw import write_preset


def test_every_key_can_be_set_and_nothing_else_changes() -> None:
    values = {
        "width": 512, "height": 160, "steps": 7, "shift": 2.5, "guidance": 1, "solver": "dpm++",
        "frames": 9, "fps": 30, "tiling": "official", "strips": 2, "overlap": 5, "order": "tiles",
        "bf16_einsum": "true", "bf16_timesteps": "true", "truncating_uint8": "true",
    }  # fmt: skip
    plain = asdict(PRESETS["nano"])
    assert {key.partition(".")[2] for key in KEYS} == values.keys()
    for key in KEYS:
        table, _, field = key.partition(".")
        changed = asdict(find_preset("nano", [f"{key}={values[field]}"]))
        wanted = True if values[field] == "true" else values[field]
        assert changed[table].pop(field) == wanted
        assert plain[table][field] != wanted
        expected = {**plain, table: {k: x for k, x in plain[table].items() if k != field}}
        assert changed == expected


def test_a_file_can_be_changed_and_several_keys_at_once(tmp_path: Path) -> None:
    file = write_preset(tmp_path / "p.toml")
    changed = find_preset(str(file), [" video.frames = 9 ", 'decode.tiling="official"'])
    before = find_preset(str(file))
    assert changed == replace(
        before,
        video=replace(before.video, frames=9),
        decode=replace(before.decode, tiling="official"),
    )


def test_a_draft_gets_a_high_res_stage_whole_or_not_at_all() -> None:
    stage = ["width=896", "height=512", "steps=4", "shift=5.5", "guidance=5"]
    preset = find_preset("draft", [f"highres.{one}" for one in stage])
    assert preset.highres is not None
    assert (preset.highres.width, preset.highres.guidance) == (896, 5.0)
    with pytest.raises(BadRequest, match=r"highres\.height: Field required"):
        find_preset("draft", ["highres.width=896"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["highres.step=5"], "highres.steps"),
        (["higres.steps=5"], "highres.steps"),
        (["steps=5"], "draft.steps or highres.steps"),
        (["frames=49"], "for instance video.frames"),
        (["seed=5"], "one of draft.width"),
        (["highres=5"], "no preset has this key"),
        (["highres.steps"], "--set needs a key and its value"),
        (["=5"], "--set needs a key and its value"),
        (["highres.steps="], "--set needs a key and its value"),
        (["highres.steps=five"], "highres.steps: Input should be a valid integer"),
        (["highres.steps=5.5"], "highres.steps: Input should be a valid integer"),
        (["highres.steps=true"], "highres.steps: Input should be a valid integer"),
        (["highres.shift=nan"], "highres.shift: Input should be a valid number"),
        (["highres.shift=1e999"], "highres.shift is inf"),
        (["highres.steps=" + "9" * 5000], "highres.steps: Input should be a valid integer"),
        (["compat.bf16_einsum=1"], "compat.bf16_einsum: Input should be a valid boolean"),
        (["decode.order=rows"], "decode.order: Input should be 'auto'"),
        (["video.frames=48"], "video.frames is 48, wanted 4n+1, for instance 45"),
        (["highres.steps=5", "highres.steps=6"], "--set highres.steps is given twice"),
    ],
)
def test_faults_name_the_key_and_what_is_near(changes: list[str], named: str) -> None:
    with pytest.raises(BadRequest) as error:
        find_preset("nano", changes)
    assert named in str(error.value)


def test_a_changed_preset_has_a_name_that_makes_it_again() -> None:
    changes = ["draft.solver=dpm++", "highres.shift=5.25", "compat.truncating_uint8=true"]
    changed = find_preset("2k", changes)
    words = shlex.split(preset_name(changed))
    assert words[0] == "2k"
    assert words[1::2] == ["--set"] * 3
    assert find_preset(words[0], words[2::2]) == changed
    for name, preset in PRESETS.items():
        assert preset_name(preset) == name
    other = with_frames(sized(find_preset("4k", ["highres.steps=6"]), (1280, 2240)), 49)
    assert preset_name(other) == "4k --size 1280x2240 --frames 49 --set highres.steps=6"
    far = replace(changed, draft=replace(changed.draft, width=64, height=64, steps=3, shift=1.0))
    assert preset_name(far) == "FILE.toml"
