# SPDX-License-Identifier: Apache-2.0
"""An engine is found whole and under its own key, or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pw_engines import store as store_module
from pw_engines.manifest import MANIFEST
from pw_engines.store import EngineStore, Entry, StoreError, default_root
from tests.engines.small import DATA, NAME, key, put


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


def test_nothing_is_made_before_the_first_build(store: EngineStore) -> None:
    assert store.find(key()).state == "missing"
    assert store.find(key()).reason == "not built yet"
    assert store.entries(verify=True) == []
    assert store.remove_leftovers() == []
    assert not store.root.exists()


def test_what_was_published_is_found(store: EngineStore) -> None:
    put(store)
    lookup = store.find(key())
    assert lookup.state == "fresh"
    assert lookup.path is not None
    assert lookup.path.read_bytes() == DATA
    assert store.find(key(backend="tensorrt")).state == "missing"
    assert store.remove_leftovers() == []


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A damage to the manifest that leaves it JSON."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda folder: (folder / NAME).write_bytes(DATA[:-1]),
        "engine.bin has 1199 bytes, expected 1200",
    ),
    "changed": (
        lambda folder: (folder / NAME).write_bytes(b"M" + DATA[1:]),
        "engine.bin is not the file that was published",
    ),
    "file missing": (
        lambda folder: (folder / NAME).unlink(),
        "engine.bin cannot be read (No such file or directory)",
    ),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest"),
    "manifest garbled": (
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff{"),
        "its manifest cannot be read (",
    ),
    "manifest no object": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        "format None, expected 1",
    ),
    "manifest empty": (lambda folder: (folder / MANIFEST).write_text(""), "cannot be read ("),
    "format": (edit(lambda it: it.update(format=0)), "format 0, expected 1"),
    "incomplete": (edit(lambda it: it.pop("sha256")), "its manifest has no usable sha256"),
    "key": (edit(lambda it: it["key"].update(backend="eager")), "has another key"),
    "key no object": (edit(lambda it: it.update(key=7)), "its manifest has no usable key"),
    "file elsewhere": (
        edit(lambda it: it.update(file="../engine")),
        "its manifest names ../engine",
    ),
    "file no name": (edit(lambda it: it.update(file=7)), "its manifest has no usable file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_engine_is_not_found_but_rebuilt(name: str, store: EngineStore) -> None:
    damage, reason = DAMAGES[name]
    folder = put(store)
    damage(folder)
    lookup = store.find(key())
    assert lookup.state == "damaged"
    assert lookup.path is None
    assert str(folder) in lookup.reason
    assert reason in lookup.reason
    (entry,) = store.entries(verify=True)
    assert (entry.damage != "") == (name != "key")  # which key is expected, only find() knows
    put(store)
    assert store.find(key()).state == "fresh"
    assert {path.name for path in folder.iterdir()} == {NAME, MANIFEST}


def test_entries_tell_what_is_there(store: EngineStore) -> None:
    put(store)
    put(store, key(backend="tensorrt"))
    (store.root / ".building-x").mkdir()
    first, second = store.entries(verify=False)
    assert (first.segment, first.backend, first.damage) == ("mix", "aoti", "")
    assert second.backend == "tensorrt"
    assert first.folder == key().folder
    assert first.bytes > len(DATA)
    assert first.seconds >= 0
    assert first.key["spec"]["limits"] == [["tokens", 40]]


def test_entries_read_the_files_only_when_asked(store: EngineStore) -> None:
    (put(store) / NAME).write_bytes(b"other")
    assert [entry.damage for entry in store.entries(verify=False)] == [""]
    assert "has 5 bytes" in store.entries(verify=True)[0].damage


def test_removed_engines_are_gone(store: EngineStore) -> None:
    folder = put(store)
    store.remove(folder.name)
    assert store.find(key()).state == "missing"
    with pytest.raises(StoreError, match="is not an engine of"):
        store.remove(folder.name)


def test_an_engine_that_is_built_again_meanwhile_is_not_pruned(store: EngineStore) -> None:
    keys = sorted((key(), key(backend="tensorrt")), key=lambda one: one.folder)
    for one in keys:
        (put(store, one) / NAME).write_bytes(b"damaged")
    first, second = (one.folder for one in keys)

    def reason_of(entry: Entry) -> str:
        if entry.folder == first:  # another process builds the second one now
            put(store, keys[1])
        return entry.damage

    assert [name for name, _ in store.prune(reason_of)] == [first]
    assert [entry.folder for entry in store.entries(verify=True)] == [second]


def test_an_engine_that_is_being_built_is_kept_and_named(store: EngineStore) -> None:
    folder = put(store)
    with store.locked(key()):
        assert list(store.prune(lambda entry: "asked for")) == [(folder.name, None)]
        assert store.find(key()).state == "fresh"
    assert list(store.prune(lambda entry: "asked for")) == [(folder.name, "asked for")]
    assert store.find(key()).state == "missing"


def test_a_file_that_is_renamed_while_it_is_listed_is_no_damage(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the partial manifest is, when a measurement is added."""
    folder, listed = put(store), Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        yield from listed(path)
        if path == folder:
            yield path / f".{MANIFEST}.partial"

    monkeypatch.setattr(Path, "iterdir", iterdir)
    (entry,) = store.entries(verify=True)
    assert entry.damage == ""
    assert entry.bytes > len(DATA)


def test_only_engines_are_removed(store: EngineStore) -> None:
    """Everything named here lies in the folder of this test: a path of the system's, or of anyone
    else's, has no place in a test of what deletes."""
    put(store)
    other = store.root.parent / "other"
    other.mkdir()
    (store.root / "linked").symlink_to(other)
    (store.root / "file").write_text("")
    for name in ("", ".", "..", ".locks", "../other", str(other), "file"):
        with pytest.raises(StoreError, match="is not an engine of"):
            store.remove(name)
    with pytest.raises(StoreError, match="cannot remove"):
        store.remove("linked")
    assert other.is_dir()
    assert (store.root / ".locks").is_dir()
    assert store.find(key()).state == "fresh"


def test_an_engine_that_cannot_be_removed_is_reported(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(store)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(store_module.shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match=r"cannot remove .*Permission denied"):
        store.remove(folder.name)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_raises_leaves_nothing(error: type[BaseException], store: EngineStore) -> None:
    def build() -> None:
        with store.locked(key()), store.publishing(key(), NAME) as path:
            path.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        build()
    assert store.find(key()).state == "missing"
    assert store.remove_leftovers() == []
    with store.locked(key(), wait=False) as mine:
        assert mine


def test_a_failed_rebuild_keeps_the_engine_that_is_there(store: EngineStore) -> None:
    put(store)
    with pytest.raises(RuntimeError), store.publishing(key(), NAME):
        raise RuntimeError
    assert store.find(key()).state == "fresh"


@pytest.mark.parametrize("at", ["fsync", "rename", "write_text"])
def test_a_full_disk_while_publishing_leaves_nothing(
    at: str, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if at == "fsync" else Path, at, full)
    with pytest.raises(StoreError, match="No space left on device; free some space") as caught:
        put(store)
    assert key().folder in str(caught.value)
    monkeypatch.undo()
    assert store.find(key()).state == "missing"
    assert store.remove_leftovers() == []


def test_a_build_that_made_no_file_is_an_error(store: EngineStore) -> None:
    with pytest.raises(StoreError, match="No such file"), store.publishing(key(), NAME):
        pass
    assert store.find(key()).state == "missing"


def test_a_root_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = EngineStore(tmp_path / "file" / "engines")
    for use in (store.locked(key()), store.publishing(key(), NAME)):
        with pytest.raises(StoreError, match=r"cannot create the engine store .*PW_CACHE"), use:
            pass


def test_a_root_that_cannot_be_written_is_reported(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root one may write anywhere: the refusal is the system's, made up."""
    put(store)

    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.tempfile, "mkdtemp", refuse)
        with pytest.raises(StoreError, match=r"cannot build in .*Permission denied.*PW_CACHE"):
            put(store)
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "open", refuse)
        with pytest.raises(StoreError, match=r"cannot lock .*Permission denied"):
            put(store)


def test_an_unreadable_file_is_damage(store: EngineStore) -> None:
    folder = put(store)
    (folder / NAME).unlink()
    (folder / NAME).mkdir()
    assert store.find(key()).state == "damaged"


def test_default_root_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW_CACHE", "/somewhere")
    assert default_root() == Path("/somewhere/engines")
    monkeypatch.delenv("PW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_root() == Path("/cache/pixelwizard/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_root() == Path("/home/someone/.cache/pixelwizard/engines")


def test_locks_of_other_engines_do_not_matter(store: EngineStore) -> None:
    with store.locked(key()), store.locked(key(backend="tensorrt"), wait=False) as mine:
        assert mine
