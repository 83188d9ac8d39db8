# SPDX-License-Identifier: Apache-2.0
"""PixelWizard's .pt files: the member that is used, and the cleaning of its names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pw_export.convert import convert
from pw_runtime.errors import BadRequest, BadWeights
from tests.convert.layouts import (
    INFIXES,
    SHARDS,
    State,
    holds,
    official_state,
    pixelwizard_state,
    quietly,
)
from tests.oracle.checkpoint import Checkpoint


@pytest.fixture
def plain(checkpoint: Checkpoint) -> State:
    """Load a draft network with clean names."""
    return official_state(checkpoint.base)["draft"]


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def doubled(state: State) -> State:
    return {name: 2 * tensor for name, tensor in state.items()}


@pytest.mark.parametrize("infix", INFIXES)
def test_wrapper_names_are_cut_wherever_they_stand(
    infix: str, plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def wrapped(name: str) -> str:
        head, _, tail = name.rpartition(".")
        return f"{infix}{head}.{infix}{infix}{tail}"

    draft = saved(
        tmp_path / "d.pt", {"generator": {f"model.{wrapped(n)}": t for n, t in plain.items()}}
    )
    assert holds(quietly(tmp_path / "b", wan=checkpoint.base, draft=draft), "draft", plain)


def test_leading_model_is_cut_only_where_all_names_have_it(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    mixed = {n if n.startswith("head.") else f"model.{n}": t for n, t in plain.items()}
    draft = saved(tmp_path / "d.pt", {"generator": mixed})
    with pytest.raises(BadWeights, match=r"model\.blocks\.0") as caught:
        quietly(tmp_path / "b", wan=checkpoint.base, draft=draft)
    assert "do this" in str(caught.value)


def test_generator_is_preferred_and_ema_is_used_on_request(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    both = saved(tmp_path / "d.pt", {"generator": plain, "generator_ema": doubled(plain)})
    first = quietly(tmp_path / "one", wan=checkpoint.base, draft=both)
    lines: list[str] = []
    second = convert(
        wan=checkpoint.base, draft=both, ema=True, out=tmp_path / "two", say=lines.append
    )
    assert "d.pt: using its member generator_ema, not generator" in lines
    assert holds(first, "draft", plain)
    assert first.manifest.source["draft"] == f"{tmp_path.name}/d.pt:generator"
    assert holds(second, "draft", doubled(plain))
    assert second.manifest.source["draft"] == f"{tmp_path.name}/d.pt:generator_ema"


def test_ema_stands_in_for_a_missing_generator_and_is_reported(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    draft = saved(tmp_path / "d.pt", {"generator_ema": plain})
    lines: list[str] = []
    bundle = convert(wan=checkpoint.base, draft=draft, out=tmp_path / "b", say=lines.append)
    assert holds(bundle, "draft", plain)
    assert "d.pt: no generator, using generator_ema" in lines


def test_bare_state_dict_is_used_unchanged(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    draft = saved(tmp_path / "d.pt", plain)
    bundle = quietly(tmp_path / "b", wan=checkpoint.base, draft=draft)
    assert holds(bundle, "draft", plain)
    assert bundle.manifest.source["draft"] == f"{tmp_path.name}/d.pt:bare"


def test_ema_absent_is_an_error_naming_what_is_there(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadWeights, match=r"no EMA weights[\s\S]*generator[\s\S]*without --ema"):
        quietly(tmp_path / "b", wan=checkpoint.base, highres=checkpoint.highres, ema=True)


def test_ema_without_any_pixelwizard_file_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=r"--ema needs a PixelWizard checkpoint[\s\S]*omit --ema"):
        quietly(tmp_path / "b", wan=checkpoint.base, ema=True)


def test_two_names_for_one_tensor_are_an_error(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = {**plain, "_orig_mod.head.head.bias": plain["head.head.bias"]}
    draft = saved(tmp_path / "d.pt", {"generator": state})
    with pytest.raises(BadWeights, match=r"a tensor under two names[\s\S]*head\.head\.bias"):
        quietly(tmp_path / "b", wan=checkpoint.base, draft=draft)


def test_highres_checkpoint_as_draft_is_refused_with_the_right_flag(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadWeights, match=r"cannot be the draft[\s\S]*pass it as --highres"):
        quietly(tmp_path / "b", wan=checkpoint.base, draft=checkpoint.highres)


def test_plain_checkpoint_as_highres_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The official loader only warns and then adds a random control to the video."""
    with pytest.raises(
        BadWeights, match=r"not a high-res checkpoint[\s\S]*lr checkpoint as --draft"
    ):
        quietly(tmp_path / "b", wan=checkpoint.base, highres=checkpoint.draft)


@pytest.mark.parametrize("part", ["spatial_adapter.", "dt_embedding.", "zero_layers"])
def test_highres_checkpoint_with_a_part_missing_is_refused(
    part: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = {n: t for n, t in pixelwizard_state(checkpoint.highres).items() if part not in n}
    highres = saved(tmp_path / "h.pt", {"generator": state})
    with pytest.raises(BadWeights, match=r"not a high-res checkpoint[\s\S]*dt_embedding"):
        quietly(tmp_path / "b", wan=checkpoint.base, highres=highres)


def test_control_blocks_and_adapter_width_come_from_the_names(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = pixelwizard_state(checkpoint.highres)
    for leaf in ("weight", "bias"):
        state[f"spatial_adapter.zero_layers.2.{leaf}"] = state[
            f"spatial_adapter.zero_layers.1.{leaf}"
        ].clone()
    highres = saved(tmp_path / "h.pt", {"generator": state})
    bundle = quietly(tmp_path / "b", wan=checkpoint.base, highres=highres)
    assert bundle.networks.highres is not None
    config = bundle.networks.highres.config
    assert (config.has_dt, config.adapter_dim, config.control_blocks) == (True, 48, (1, 2))


def test_base_shards_are_read_only_without_a_draft(
    plain: State, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert all((checkpoint.base / name).exists() for name in SHARDS)
    draft = saved(tmp_path / "d.pt", doubled(plain))
    assert holds(quietly(tmp_path / "b", wan=checkpoint.base, draft=draft), "draft", doubled(plain))
