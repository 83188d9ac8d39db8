# SPDX-License-Identifier: Apache-2.0
"""The store of finished tiles: what is not its own stays, and what it says of a damaged one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pw_runtime.errors import WriteFailed
from pw_runtime.system.tile_store import TileStore, remove_tiles, state_of

SHAPES = [(2, 4), (3, 4)]
MADE_OF = {"latent": "a"}


def told_nothing(text: str) -> None:
    raise AssertionError(text)


def complete(path: Path) -> TileStore:
    """Return a store whose two tiles, of two frames, are complete."""
    store = TileStore(path, MADE_OF, told_nothing)
    store.open(SHAPES, 2)
    for shape in SHAPES:
        store.write(torch.ones((2, *shape), dtype=torch.uint8))
        store.finish()
    return store


@pytest.mark.parametrize("name", ["clip.tiles", "clip.tiles.state"])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to(path.with_name("precious")), "a link"),
        (lambda path: path.symlink_to("nowhere"), "a link"),
    ],
    ids=["folder", "pipe", "link", "link to nothing"],
)
def test_what_is_no_file_in_the_place_of_the_store_stays(tmp_path, make, got, name) -> None:
    (tmp_path / "precious").write_text("kept")
    make(tmp_path / name)
    store = TileStore(tmp_path / "clip.tiles", MADE_OF, told_nothing)
    with pytest.raises(WriteFailed) as refused:
        store.open(SHAPES, 2)
    store.close()
    assert str(refused.value).startswith(f"cannot write {tmp_path / name}\n  got: {got}")
    assert "move it away" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["precious", name])
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_list_of_more_tiles_than_there_are_is_not_taken(tmp_path) -> None:
    path, said = tmp_path / "clip.tiles", list[str]()
    complete(path).close()
    state = json.loads(state_of(path).read_text())
    state["finished"] *= 3
    state_of(path).write_text(json.dumps(state))
    store = TileStore(path, MADE_OF, said.append)
    store.open(SHAPES, 2)
    assert store.finished == 0
    assert said == [f"{path} is of another decode (the list of tiles): decoding from the start"]
    store.close()
    assert not list(tmp_path.iterdir())


def test_tiles_that_cannot_be_read_are_named(tmp_path) -> None:
    path = tmp_path / "clip.tiles"
    store = complete(path)
    os.truncate(path, 20)
    assert torch.equal(store.read(0, 0, 2), torch.ones((2, 2, 4), dtype=torch.uint8))
    with pytest.raises(WriteFailed, match=f"cannot read the finished tiles in {path}"):
        store.read(1, 0, 2)
    store.close()


def test_removed_tiles_leave_nothing(tmp_path) -> None:
    complete(tmp_path / "clip.tiles").close()
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(2):
        remove_tiles(tmp_path / "clip.tiles")
        assert not list(tmp_path.iterdir())
