# SPDX-License-Identifier: Apache-2.0
"""Whatever is done to the bytes of a checkpoint, `convert` ends with a bundle or with one error."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_runtime.checkpoint.bundle import open_bundle, verify
from pw_runtime.errors import PixelWizardError
from tests.convert.layouts import INDEX, T5, VAE, official_state, quietly, write_diffusers
from tests.oracle.checkpoint import Checkpoint

CASES = 160
SNIPPETS = (b"999", b"-1,", b"nul", b"[[[", b"{}}", b"1e9", b"NaN", b"\0\0\0")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes, most of them in the first or the last 8 KiB, where structure is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        reach = min(len(data), 8192)
        at = rng.randrange(reach)
        if rng.random() < 0.4:
            at = len(data) - 1 - at
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randrange(1, 20)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data[at : at + 3] = rng.choice(SNIPPETS)
            case 4:
                data[at : at + 8] = data[rng.randrange(reach) :][:8]
        if not data:
            break
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.05 else data)


@pytest.mark.slow
def test_mutated_files_give_a_bundle_or_one_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rng = random.Random(15)
    theirs = write_diffusers(tmp_path / "theirs", checkpoint.base)
    state = official_state(checkpoint.base)["draft"]
    save_file(state, tmp_path / "draft.safetensors")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    official = ("config.json", INDEX, VAE, T5, "google/umt5-xxl/tokenizer.json")
    networks = ("vae", "transformer", "text_encoder")
    targets = [(checkpoint.base, checkpoint.base / name) for name in official]
    targets += [(theirs, theirs / network / "config.json") for network in networks]
    drafts = [tmp_path / "draft.safetensors", tmp_path / "legacy.pt", checkpoint.highres]
    targets += [(checkpoint.base, draft) for draft in drafts]
    ends = {"bundle": 0, "error": 0}
    for case in range(CASES):
        base, target = rng.choice(targets)
        folder = tmp_path / str(case)
        shutil.copytree(base, folder / "wan", copy_function=lambda a, b: Path(b).symlink_to(a))
        inside = target.is_relative_to(base)
        copy = folder / "wan" / target.relative_to(base) if inside else folder / target.name
        copy.unlink(missing_ok=True)
        copy.write_bytes(mutated(target.read_bytes(), rng))
        draft = {} if inside else {"draft": copy}
        try:
            bundle = quietly(folder / "bundle", wan=folder / "wan", **draft)
        except PixelWizardError as error:
            ends["error"] += 1
            message = str(error)
            assert "do this: " in message, (case, message)
            assert "weights_only" not in message, (case, message)
            assert len(message) < 3000, (case, message)
            assert not (folder / "bundle").exists()
        else:
            ends["bundle"] += 1
            verify(open_bundle(bundle.root))
        shutil.rmtree(folder)
    assert min(ends.values()) > CASES // 40
