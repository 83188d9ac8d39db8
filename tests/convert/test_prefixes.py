# SPDX-License-Identifier: Apache-2.0
"""A network is found under any prefix that all names share, and in any sole member of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pw_export.convert import convert
from pw_runtime.errors import BadWeights
from tests.convert.layouts import T5, VAE, State, holds, official_state, quietly
from tests.oracle.checkpoint import Checkpoint

PREFIXES = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "model.module._orig_mod.",
    "transformer.net.",
)
OTHERS = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}}


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> State:
    """Load a draft network with clean names."""
    return official_state(checkpoint.base)["draft"]


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def converted(checkpoint: Checkpoint, draft: Path, plain: State) -> list[str]:
    """Convert with this draft, check that it is `plain`, and return the lines of progress."""
    lines: list[str] = []
    out = draft.parent / "bundle"
    bundle = convert(wan=checkpoint.base, draft=draft, out=out, say=lines.append)
    assert holds(bundle, "draft", plain)
    return lines


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefix_that_all_names_share_is_removed_and_named(
    suffix: str, prefix: str, plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file, state = tmp_path / f"d{suffix}", prefixed(plain, prefix)
    torch.save(state, file) if suffix == ".pt" else save_file(state, file)
    lines = converted(checkpoint, file, plain)
    removed = prefix.replace("_orig_mod.", "")
    assert f"names read without {removed or '_orig_mod.'}" in "\n".join(lines)


@pytest.mark.parametrize("path", [["state_dict"], ["model"], ["module"], ["ema"], list("abcd")])
@pytest.mark.parametrize("others", [{}, OTHERS, {"step": torch.tensor(7), "decay": None}])
def test_sole_network_among_the_members_is_used_and_the_rest_named(
    others: dict[str, object],
    path: list[str],
    plain: State,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    content: dict[str, object] = {**prefixed(plain, "module.")}
    for key in reversed(path):
        content = {key: content}
    torch.save({**content, **others}, tmp_path / "d.pt")
    lines = converted(checkpoint, tmp_path / "d.pt", plain)
    rest = f", not {', '.join(sorted(others))}" if others else ""
    assert f"d.pt: using its member {'.'.join(path)}{rest}" in lines


@pytest.mark.parametrize(("name", "network"), [(VAE, "vae"), (T5, "text_encoder")])
def test_vae_and_text_encoder_are_found_in_the_same_way(
    name: str, network: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wan = tmp_path / "wan"
    wan.mkdir()
    for file in checkpoint.base.iterdir():
        (wan / file.name).symlink_to(file)
    (wan / name).unlink()
    state = official_state(checkpoint.base)[network]
    torch.save({"state_dict": prefixed(state, "module.model.")}, wan / name)
    assert holds(quietly(tmp_path / "b", wan=wan), network, state)


def _half(state: State) -> object:
    return {n if n.startswith("head") else f"model.{n}": t for n, t in state.items()}


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (_half, ["model (", "such as model.blocks.0", "head (3, such as head.head.bias)"]),
        (
            lambda state: (
                prefixed(state, "model.diffusion_model.") | {"vae.conv1.bias": torch.zeros(1)}
            ),
            ["model.diffusion_model (", "vae.conv1.bias (1, "],
        ),
        (lambda state: {"model": state, "ema": state}, ["several networks", "ema, model"]),
        (lambda state: {**state, "ema": state}, ["several networks", "ema, the file itself"]),
        (lambda state: {f"model.{n}x": t for n, t in state.items()}, ["under model (", "bias"]),
    ],
)
def test_names_that_cannot_be_read_are_named_with_their_prefixes(
    make: Callable[[State], object],
    parts: list[str],
    plain: State,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    """Seen: a whole file with a prefix was called incomplete, to be downloaded again."""
    torch.save(make(plain), tmp_path / "d.pt")
    with pytest.raises(BadWeights) as caught:
        quietly(tmp_path / "b", wan=checkpoint.base, draft=tmp_path / "d.pt")
    message = str(caught.value)
    assert [part for part in [*parts, "do this: "] if part not in message] == [], message
    assert "download it again" not in message
