# SPDX-License-Identifier: Apache-2.0
"""A cache into which others can write is refused as a whole: an engine is a program."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from pw_engines.manifest import MANIFEST, MAX_MANIFEST
from pw_engines.store import EngineStore, StoreError
from pw_runtime.errors import BadRequest
from pw_runtime.system.trusted_folder import trusted_folder
from tests.engines.small import key, put

OTHER = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    store = EngineStore(tmp_path / "cache" / "engines")
    put(store)
    return store


def refused(store: EngineStore, words: str) -> None:
    """Both ways to use a store, and the cache of bundles, refuse its folder."""
    with pytest.raises(StoreError, match=words) as caught:
        store.find(key())
    assert "set PW_CACHE" in str(caught.value)
    with pytest.raises(StoreError, match=words):
        store.make_root()
    with pytest.raises(BadRequest, match=words):
        trusted_folder(store.root)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_new_caches_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        EngineStore(tmp_path / "a" / "engines").make_root()
        trusted_folder(tmp_path / "b" / "bundles")
    finally:
        os.umask(before)
    for name in ("a/engines", "b/bundles", "a", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700, name
    assert EngineStore(tmp_path / "a" / "engines").find(key()).state == "missing"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o722, 0o702])
def test_a_store_that_others_can_write_to_is_refused(store: EngineStore, mode: int) -> None:
    store.root.chmod(mode)
    refused(store, f"others can write into .*engines .mode {mode:o}.")
    store.root.chmod(0o755)
    assert store.find(key()).state == "fresh"


def test_a_store_that_others_can_rename_is_refused(store: EngineStore) -> None:
    store.root.parent.chmod(0o777)
    with pytest.raises(StoreError, match=r"others can write into .*cache"):
        store.find(key())
    store.root.parent.chmod(0o1777)  # as /tmp: others cannot rename there
    assert store.find(key()).state == "fresh"


@root_only
@pytest.mark.parametrize("part", ["root", "parent"])
def test_a_store_of_another_user_is_refused(store: EngineStore, part: str) -> None:
    os.chown(store.root if part == "root" else store.root.parent, OTHER, OTHER)
    with pytest.raises(StoreError, match=f"belongs to user {OTHER}.*chown -R 0"):
        store.find(key())


@root_only
@pytest.mark.parametrize("part", ["folder", "file"])
def test_an_engine_of_another_user_is_not_loaded(store: EngineStore, part: str) -> None:
    path = store.find(key()).path
    assert path is not None
    os.chown(path if part == "file" else path.parent, OTHER, OTHER)
    lookup = store.find(key())
    assert lookup.state == "damaged"
    assert f"belongs to user {OTHER}" in lookup.reason


def test_a_folder_that_is_not_there_yet_is_no_fault(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert EngineStore(tmp_path / "engines").find(key()).state == "missing"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large", "deep", "nan", "list"])
def test_a_manifest_that_is_none_is_a_damage(store: EngineStore, kind: str) -> None:
    path = store.find(key()).path
    assert path is not None
    manifest = path.parent / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.unlink()
    if kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "folder":
        manifest.mkdir()
    elif kind == "device":
        manifest.symlink_to("/dev/zero")
    else:
        manifest.write_text(
            {
                "large": " " * (MAX_MANIFEST + 1),
                "deep": "[" * 100_000,
                "nan": json.dumps(content | {"seconds": float("nan")}),
                "list": "[]",
            }[kind]
        )
    assert store.find(key()).state == "damaged"
    assert [entry.folder for entry in store.entries(verify=True) if entry.damage]
