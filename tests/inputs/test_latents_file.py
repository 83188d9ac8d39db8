# SPDX-License-Identifier: Apache-2.0
"""A latents file is read as it was written, or refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pw_runtime.errors import BadRequest
from pw_runtime.job.latents import (
    METADATA,
    digests_of,
    is_resumable,
    read_latent,
    read_provenance,
    write_latents,
)
from pw_runtime.job.provenance import parse_provenance, provenance_json, require_storable
from pw_runtime.sampling.noise import latent_shape, load_noise
from pw_runtime.system.tensor_file import DIGESTS
from pw_runtime.types import RunOptions
from tests.inputs.small_files import PRESET, small_latents, small_provenance

CPU = torch.device("cpu")
FLIPS = 300


def read(path: Path) -> torch.Tensor:
    return read_latent(path, small_provenance(), "draft", CPU).x


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = small_latents(tmp_path / "0.latents.safetensors")
    assert is_resumable(path)
    content, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of them in the header: all else is numbers, where one place is like another.
    bits = [draw.randrange(8 * (header if i % 2 else len(content))) for i in range(FLIPS)]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(BadRequest):
            read(path)


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    path = small_latents(tmp_path / "0.latents.safetensors")
    assert read_provenance(path) == small_provenance()
    latent = read(path)
    write_latents(path, small_provenance(), {"draft_latent": latent})
    assert torch.equal(read(path), latent)


def test_a_tensor_without_a_digest_and_a_digest_without_a_tensor_are_refused(
    tmp_path: Path,
) -> None:
    path = small_latents(tmp_path / "0.latents.safetensors")
    tensors = {"draft_latent": read(path).clone()}
    text = provenance_json(small_provenance())
    own = digests_of(text, tensors)
    cases = {"no digests": None, "more": {**own, "x": "0" * 64}, "none": {}, "list": [1]}
    for name, digests in cases.items():
        metadata = {METADATA: text} | ({} if digests is None else {DIGESTS: json.dumps(digests)})
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(BadRequest, match="was altered or damaged"):
            read(path)
        assert name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_latent_that_is_not_finite_is_named_with_the_count(tmp_path: Path, value: float) -> None:
    path = small_latents(tmp_path / "0.latents.safetensors")
    latent = read(path).clone()
    latent[0, 0, 0, :2] = value
    write_latents(path, small_provenance(), {"draft_latent": latent})
    with pytest.raises(BadRequest, match="draft_latent, in 2 of 768 values"):
        read(path)


def put(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change that sets a nested field."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


ORIGINS = [
    (put("decode", "strips", value=0), "decode.strips is 0"),
    (put("decode", "strips", value=10**9), "decode.strips is 1000000000"),
    (put("decode", "strips", value=-1), "decode.strips is -1"),
    (put("decode", "overlap", value=10**9), "decode.overlap is 1000000000"),
    (put("decode", "tiling", value="other"), "decode.tiling"),
    (put("preset", "draft", "width", value=-32), "draft.width is -32"),
    (put("preset", "draft", "steps", value=10**9), "draft.steps is"),
    (put("preset", "draft", "shift", value=1e300), "draft.shift is"),
    (put("preset", "draft", "guidance", value=1e300), "draft.guidance is"),
    (put("preset", "video", "frames", value=2**40), "video.frames is"),
    (put("preset", "draft", value=None), "preset.draft"),
    (put("seeds", value={}), "seeds are {}"),
    (put("seeds", value={"base": 7}), "seeds are {'base': 7}"),
    (put("seeds", "base", value=-1), "seeds are"),
    (put("seeds", "draft", value=8), "seeds are"),
    (put("seeds", "base", value="7"), "seeds.base: Input should be a valid integer"),
    (put("seeds", "base", value=10**30), "seeds are"),
    (put("seeds", "base", value=7.5), "seeds.base"),
    (put("prompt", "position", value=0), "prompt.position is 0"),
    (put("prompt", "position", value=2**62), "prompt.position is"),
    (put("prompt", "id", value="../0"), "cannot name a file"),
    (put("prompt", "id", value="a\x1b[2J"), "cannot name a file"),
    (put("prompt", "text", value=5), "prompt.text"),
    (put("noise", value={"draft": "x"}), "noise.draft is no SHA-256"),
    (put("noise", value={"decode": "0" * 64}), "noise is that of decode"),
    (put("bundle", value={}), "bundle.digest is missing"),
    (put("vae", value=""), "vae is no SHA-256"),
    (put("seconds", "draft", value=-1.0), "seconds"),
    (put("options", "chunk", value=0), "options.chunk is 0"),
    (put("options", "device", value="mps\n"), "options.device is"),
    (put("options", "codec", value="gif"), "options.codec"),
    (put("format", value=7), "format 7"),
    (put("unknown", value=1), "unknown"),
]


@pytest.mark.parametrize(("change", "says"), ORIGINS)
def test_an_origin_that_no_run_has_is_one_error(
    change: Callable[[dict[str, Any]], None], says: str
) -> None:
    content = json.loads(provenance_json(small_provenance()))
    change(content)
    with pytest.raises(BadRequest) as caught:
        parse_provenance(json.dumps(content), Path("0.latents.safetensors"))
    assert says in str(caught.value)
    assert "do this" in str(caught.value) or "wanted" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "5",
        "[" * 100_000,
        '{"a":' * 5000,
        '{"seconds": NaN}',
        "1e999",
        '"\\ud800"',
    ],
)
def test_metadata_that_is_no_object_is_one_error(text: str) -> None:
    with pytest.raises(BadRequest, match="has metadata that this version cannot read"):
        parse_provenance(text, Path("0.latents.safetensors"))


def test_seconds_that_are_no_numbers_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        text = provenance_json(replace(small_provenance(), seconds={"draft": value}))
        for written in (text, text.replace("null", str(value)), text.replace("null", "1e999")):
            with pytest.raises(BadRequest):
                parse_provenance(written, Path("0.latents.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"negative": "\udcff"},
        {"noise_file": "/folder/\udcff.safetensors"},
        {"options": RunOptions(device="cpu", precision="fp32", chunk=2**24 + 1)},
        {"options": RunOptions(device="cuda:99999", precision="fp32")},
        {"seeds": {"base": -1, "draft": 99, "highres": 9999}},
        {"bundle": {}},
    ],
)
def test_an_origin_that_could_not_be_read_again_is_refused_before_the_run(
    changes: dict[str, Any],
) -> None:
    require_storable(small_provenance())
    with pytest.raises(BadRequest, match="could not be stored with their origin\n  got: "):
        require_storable(replace(small_provenance(), **changes))


def test_noise_of_a_latents_file_is_as_it_was_drawn(tmp_path: Path) -> None:
    path = small_latents(tmp_path / "0.latents.safetensors")
    content, stages = path.read_bytes(), PRESET.stages()
    with safe_open(path, framework="pt") as file:
        noise = file.get_tensor("draft_noise").numpy().tobytes()
    start = content.index(noise)
    assert torch.isfinite(load_noise(path, stages, PRESET.video)["draft"]).all()
    for bit in random.Random(0).sample(range(8 * len(noise)), 40):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(BadRequest, match="another SHA-256 of draft_noise"):
            load_noise(path, stages, PRESET.video)


@pytest.mark.parametrize("metadata", [None, {"sha256": "0" * 64}, {"sha256": "[1]"}])
def test_noise_of_other_programs_needs_no_digest(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    shape = latent_shape(PRESET.draft, PRESET.video)
    save_file({"draft_noise": torch.ones(shape)}, tmp_path / "noise", metadata=metadata)
    assert load_noise(tmp_path / "noise", PRESET.stages(), PRESET.video)["draft"].shape == shape
