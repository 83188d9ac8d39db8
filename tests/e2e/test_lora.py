# SPDX-License-Identifier: Apache-2.0
"""`--lora`: clips with it, what records it, and what refuses to mix clips with and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pw_export.convert import convert
from pw_runtime import LoraFile, Pipeline, RunOptions, find_preset
from pw_runtime.checkpoint.bundle import open_bundle, sha256_of
from pw_runtime.server.maker import Maker
from pw_runtime.server.messages import Join, order_line, read_order
from tests.convert.loras import random_pairs, tensors_in, write_lora
from tests.e2e.pw import Pw, write_preset
from tests.oracle.checkpoint import Checkpoint

Latents = dict[str, torch.Tensor]
LATENTS = "0.latents.safetensors"


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "small.toml")


@pytest.fixture(scope="module")
def lora(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = tensors_in("ComfyUI", random_pairs(open_bundle(bundle_dir)))
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", tensors)


@pytest.fixture
def command(preset: Path, bundle_dir: Path) -> tuple[object, ...]:
    prompt = ("--prompt", "a red ball", "--preset", preset)
    return ("generate", "--model", bundle_dir, *prompt, "--save-latents", "--device", "cpu")


def latents(folder: Path) -> Latents:
    return {n: x for n, x in load_file(folder / LATENTS).items() if n.endswith("_latent")}


def same(a: Latents, b: Latents) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def receipt(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "0.json").read_text(encoding="utf-8"))
    return found


def test_a_lora_changes_a_clip_and_its_scale_0_does_not(
    pw: Pw, command: tuple[object, ...], lora: Path, tmp_path: Path
) -> None:
    for name, options in {
        "without": (),
        "with": ("--lora", f"{lora}:0.7"),
        "zero": ("--lora", f"{lora}:0"),
    }.items():
        assert pw(*command, "--out", tmp_path / name, *options).code == 0
    without, with_, zero = (latents(tmp_path / name) for name in ("without", "with", "zero"))
    assert same(without, zero)
    assert not any(torch.equal(without[name], x) for name, x in with_.items())
    recorded = [{"file": "style.safetensors", "sha256": sha256_of(lora), "scale": 0.7}]
    assert receipt(tmp_path / "with")["loras"] == {"draft": recorded, "highres": recorded}
    assert "loras" not in receipt(tmp_path / "without")


def test_a_baked_bundle_makes_the_same_clip_bit_for_bit(
    pw: Pw,
    command: tuple[object, ...],
    lora: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    parts = ("--wan", checkpoint.base, "--highres", checkpoint.highres, "--quiet")
    baked = pw("convert", *parts, "--out", tmp_path / "baked", "--lora", f"{lora}:0.7")
    assert baked.code == 0, baked.err
    assert pw(*command, "--out", tmp_path / "merged", "--lora", f"{lora}:0.7").code == 0
    others = ("--model", tmp_path / "baked", "--out", tmp_path / "clips")
    assert pw(*command, *others).code == 0
    assert same(latents(tmp_path / "clips"), latents(tmp_path / "merged"))


def test_the_high_res_network_takes_its_own_or_none(
    pw: Pw, command: tuple[object, ...], lora: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    assert pw(*command, "--out", both, "--lora", lora).code == 0
    none = tmp_path / "none"
    ended = pw(*command, "--out", none, "--lora", lora, "--lora-highres", "none")
    assert "LoRA of the draft network: style.safetensors, scale 1" in ended.err
    assert "LoRA of the highres network" not in ended.err
    own = tmp_path / "own"
    assert pw(*command, "--out", own, "--lora-highres", f"{lora}:-0.5").code == 0
    assert torch.equal(latents(none)["draft_latent"], latents(both)["draft_latent"])
    assert not torch.equal(latents(none)["highres_latent"], latents(both)["highres_latent"])
    assert receipt(none)["loras"].keys() == {"draft"}
    assert receipt(own)["loras"].keys() == {"highres"}
    assert receipt(own)["loras"]["highres"][0]["scale"] == -0.5


def test_clips_of_another_lora_or_scale_are_refused_not_mixed(
    pw: Pw, command: tuple[object, ...], lora: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "clips")
    assert pw(*command, *out, "--lora", lora).code == 0
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(lora.read_bytes())
    again = pw(*command, *out, "--lora", renamed)
    assert again.code == 0
    assert "skipped" in again.out + again.err
    for options, words in (
        (("--lora", f"{lora}:0.5"), "loras.draft.1.scale is 1.0, wanted 0.5"),
        ((), "loras.draft is"),
    ):
        other = pw(*command, *out, *options)
        assert other.code == 2
        assert words in other.err


def test_a_draft_goes_on_with_another_high_res_lora_but_not_with_another_draft_lora(
    pw: Pw, command: tuple[object, ...], lora: Path, tmp_path: Path
) -> None:
    drafts = tmp_path / "drafts"
    assert pw(*command, "--out", drafts, "--draft-only", "--lora", lora).code == 0
    finish = (*command, "--drafts", drafts)
    own = ("--lora", lora, "--lora-highres", f"{lora}:0.5")
    assert pw(*finish, "--out", tmp_path / "own", *own).code == 0
    other = pw(*finish, "--out", tmp_path / "other", "--lora", f"{lora}:0.5")
    assert other.code == 2
    assert "loras" in other.err
    unused = pw(*command, "--out", drafts, "--draft-only", "--lora-highres", lora)
    assert unused.code == 2
    assert "--lora-highres is for the high-res stage, and this run has none" in unused.err


def test_a_clip_is_made_again_with_the_same_lora_alone(
    pw: Pw, command: tuple[object, ...], lora: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    assert pw(*command, "--out", tmp_path / "clips", "--lora", f"{lora}:0.7").code == 0
    again = ("repro", tmp_path / "clips" / "0.json", "--model", bundle_dir)
    for options in ((), ("--lora", lora), ("--lora", f"{lora}:0.7", "--lora-highres", "none")):
        refused = pw(*again, *options)
        assert refused.code == 2
        assert "was made with other LoRAs" in refused.err
        assert f"style.safetensors:0.7 (SHA-256 {sha256_of(lora)[:16]})" in refused.err
    repeated = pw(*again, "--lora", f"{lora}:0.7")
    assert repeated.code == 0, repeated.err
    assert "the same file, byte for byte" in repeated.out


def test_a_decode_needs_no_lora(
    pw: Pw, command: tuple[object, ...], lora: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    assert pw(*command, "--out", tmp_path / "clips", "--lora", lora).code == 0
    finish = ("decode", tmp_path / "clips" / LATENTS, "--model", bundle_dir, "--device", "cpu")
    ended = pw(*finish, "--out", tmp_path / "again")
    assert ended.code == 0, ended.err
    videos = [(tmp_path / name / "0.mp4").read_bytes() for name in ("clips", "again")]
    assert videos[0] == videos[1]
    assert receipt(tmp_path / "again")["loras"].keys() == {"draft", "highres"}


def test_mapped_weights_make_the_clip_of_resident_ones(
    pw: Pw,
    command: tuple[object, ...],
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the LoRA merged whenever a block is read, as where memory is scarce."""
    from pw_runtime.planning import candidates

    assert pw(*command, "--out", tmp_path / "resident", "--lora", lora).code == 0
    monkeypatch.setattr(candidates, "_residencies", lambda work, name, gpu: ("mapped",))
    mapped = pw(*command, "--out", tmp_path / "mapped", "--lora", lora)
    assert mapped.code == 0, mapped.err
    said = "draft: weights streamed from the bundle's files with the LoRA merged at every use"
    assert said in mapped.err
    assert same(latents(tmp_path / "mapped"), latents(tmp_path / "resident"))


def test_a_pipeline_takes_loras(
    preset: Path, bundle_dir: Path, checkpoint: Checkpoint, lora: Path, tmp_path: Path
) -> None:
    """In every form; of a bundle without a high-res network, for the draft alone."""

    def sources(**loras: Any) -> dict[str, list[float]]:
        with Pipeline.from_pretrained(bundle_dir, preset=preset, device="cpu", **loras) as pipe:
            found = pipe.bundle.lora_sources
        return {network: [x.scale for x in all_of_it] for network, all_of_it in found.items()}

    assert sources() == {}
    assert sources(loras=[lora, f"{lora}:0.5"]) == {"draft": [1.0, 0.5], "highres": [1.0, 0.5]}
    own = sources(loras=[LoraFile(lora, 2.0)], loras_highres=[])
    assert own == {"draft": [2.0]}
    alone = convert(wan=checkpoint.base, out=tmp_path / "alone", say=lambda line: None)
    with Pipeline.from_pretrained(alone.root, preset=preset, loras=[lora]) as pipe:
        assert pipe.bundle.lora_sources.keys() == {"draft"}


def test_a_lora_is_named_with_its_scale_unless_a_file_has_that_name(
    pw: Pw, command: tuple[object, ...], lora: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "style:0.5"
    odd.write_bytes(lora.read_bytes())
    assert pw(*command, "--out", tmp_path / "odd", "--lora", odd).code == 0
    assert receipt(tmp_path / "odd")["loras"]["draft"][0] == {
        "file": "style:0.5",
        "sha256": sha256_of(lora),
        "scale": 1.0,
    }
    for text, words in (
        (f"{lora}:nan", "the scale of a LoRA is nan"),
        (f"{lora}:half", f"the LoRA {lora}:half cannot be read"),
        ("", "a LoRA has no file name"),
    ):
        refused = pw(*command, "--out", tmp_path / "no", "--lora", text)
        assert refused.code == 2
        assert words in refused.err
    refused = pw(
        *command, "--out", tmp_path / "no", "--lora-highres", "none", "--lora-highres", odd
    )
    assert refused.code == 2
    assert "--lora-highres none means no LoRA, and another one is named" in refused.err


def test_a_plan_checks_the_files_and_counts_the_merge(
    pw: Pw, preset: Path, bundle_dir: Path, lora: Path
) -> None:
    """For the published networks too, whose weights need not be here."""
    common = ("plan", "--model", bundle_dir, "--preset", preset, "--verbose")
    ended = pw(*common, "--lora", lora)
    assert ended.code == 0, ended.err
    assert ended.out.count("LoRA merged into a weight") == 2
    draft = pw(*common, "--lora", lora, "--lora-highres", "none")
    assert draft.out.count("LoRA merged into a weight") == 1
    published = pw("plan", "--preset", "2k", "--gpu-memory", "24GiB", "--lora", lora)
    assert published.code == 2
    assert "cannot be merged into the draft network" in published.err
    assert "for a weight [3072, 3072]" in published.err


def test_a_server_hands_its_loras_to_its_workers(
    preset: Path, bundle_dir: Path, lora: Path
) -> None:
    join = Join(
        model=str(bundle_dir),
        presets={"small": find_preset(str(preset))},
        options=RunOptions(device="cpu"),
        loras={"draft": (LoraFile(lora, 0.5),)},
    )
    told = read_order(order_line(join))
    assert told == join
    maker = Maker(join, lambda event: None)
    assert maker.bundle.lora_sources["draft"][0].scale == 0.5
    assert maker.fits["small"].fits
