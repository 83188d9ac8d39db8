# SPDX-License-Identifier: Apache-2.0
"""`--sparse-attention`: clips whose self-attention keeps a part of the keys, and what says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.closeness import relative_l2
from tests.e2e.pw import DEFAULTS, PRESET, Pw, write_preset

PLAN = ("plan", "--preset", "2k", "--gpu-memory", "80GiB", "--host-memory", "64GiB")


def larger(path: Path, height: int) -> Path:
    """A preset of 640 pixels in a row and 5 frames: 40 tokens for 32 pixels of height."""
    small = write_preset(path, highres_guidance=1.0).read_text()
    path.write_text(small.replace("width = 192\nheight = 96", f"width = 640\nheight = {height}"))
    return path


@pytest.mark.slow
def test_a_sparse_clip_is_near_the_exact_one_and_says_what_it_is(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    preset = larger(tmp_path / "larger.toml", 480)  # 600 tokens: 5 blocks, 4 are kept
    command = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a red ball")
    exact, sparse = tmp_path / "exact", tmp_path / "sparse"
    common = ("--save-latents", "--policy", "eager")
    assert pw(*command, *common, "--out", exact).code == 0
    ended = pw(*command, *common, "--out", sparse, "--sparse-attention", 0.5)
    assert ended.code == 0
    words = "approximate: self-attention keeps 4 of 5 blocks of 128 keys, and the means of the"
    assert words in ended.out + ended.err
    receipt = json.loads((sparse / "0.json").read_text(encoding="utf-8"))
    assert receipt["options"]["sparse_attention"] == 0.5
    assert receipt["engines"]["highres"]["attention"].startswith(words)
    assert "attention" not in receipt["engines"]["draft"]
    latents = [load_file(folder / "0.latents.safetensors") for folder in (sparse, exact)]
    assert torch.equal(*(x["draft_latent"] for x in latents))
    assert 0 < relative_l2(*(x["highres_latent"] for x in latents)) < 0.1

    # An exact clip is another clip, and a receipt of before there was a choice is that of one.
    again = pw(*command, "--out", exact, "--sparse-attention", 0.5)
    assert again.code == 2
    assert "options.sparse_attention is null, wanted 0.5" in again.err
    path = exact / "0.json"
    receipt = json.loads(path.read_text(encoding="utf-8"))
    del receipt["options"]["sparse_attention"]
    path.write_text(json.dumps(receipt), encoding="utf-8")
    assert pw(*command, "--out", exact, "--policy", "eager").code == 0

    decoded = pw("decode", sparse / "0.latents.safetensors", "--model", bundle_dir, "--overwrite")
    assert decoded.code == 0, decoded.err


@pytest.mark.parametrize("keep", ["0", "1", "-0.5", "25", "nan"])
def test_a_fraction_out_of_range_is_refused(pw: Pw, keep: str) -> None:
    ended = pw(*PLAN, "--sparse-attention", keep)
    assert ended.code == 2
    assert "--sparse-attention is the fraction of the keys that are kept" in ended.err
    assert "wanted: a number between 0 and 1" in ended.err


def test_where_it_would_do_nothing_or_contradict_it_is_refused(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    sparse = ("--sparse-attention", 0.5)
    for more in (("--draft-only",), ("--preset", "draft")):
        ended = pw(*PLAN, *more, *sparse)
        assert ended.code == 2
        assert "is for the high-res stage, and this run has none" in ended.err
    ended = pw(*PLAN, *sparse, "--blocks", "attention")
    assert ended.code == 2
    assert "--blocks attention computes exact attention inside engines" in ended.err
    preset = tmp_path / "quirks.toml"
    preset.write_text(PRESET.format(**DEFAULTS | {"truncating": "true"}), encoding="utf-8")
    command = ("generate", "--model", bundle_dir, "--prompt", "a ball", "--preset", preset)
    ended = pw(*command, *sparse, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "--sparse-attention approximates" in ended.err
    assert "compat.truncating_uint8" in ended.err


def test_the_plan_says_what_is_approximate_and_counts_it(pw: Pw) -> None:
    def highres(*options: object) -> tuple[str, float]:
        ended = pw(*PLAN, "--gpu", "H200", *options)
        assert ended.code == 0
        row = next(line for line in ended.out.splitlines() if line.startswith("highres  "))
        return ended.out, float(row.split()[-2])

    exact, seconds = highres()
    assert "approximate" not in exact
    sparse, fewer = highres("--sparse-attention", 0.25)
    assert "highres: approximate: self-attention keeps 218 of 872 blocks of 128 keys" in sparse
    assert fewer < 0.5 * seconds  # modelled: attention is most of the arithmetic
