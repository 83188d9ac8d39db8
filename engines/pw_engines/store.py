# SPDX-License-Identifier: Apache-2.0
"""Store built engines on disk: found by key, verified, published whole or not at all.

    ROOT/<segment>-<backend>-<digest>/   manifest.json and the engine's file
    ROOT/.locks/<...>                    held while building; released when the builder exits
    ROOT/.building-*                     a build in progress, or left by one that was killed

An engine is used only if its manifest contains exactly the requested key and its file exactly the
bytes that were published. An engine is a program, so a store that others own or can write to is
refused as a whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pw_engines.manifest import FORMAT, MANIFEST, read_manifest, speeds_of, sync, write_manifest
from pw_engines.spec import EngineKey
from pw_engines.speed import Speed
from pw_engines.trust import distrust, foreign, make_private

State = Literal["fresh", "missing", "damaged"]


class StoreError(Exception):
    """The store cannot be read or written; the message says what, why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Result of a lookup by key: a file to load, or the reason why there is none."""

    state: State
    path: Path | None = None
    reason: str = ""
    speeds: tuple[Speed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A folder of the store."""

    folder: str
    segment: str
    backend: str
    bytes: int
    seconds: float  # duration of its build
    key: dict[str, Any]  # as JSON; empty if the manifest cannot be read
    speeds: tuple[Speed, ...] = ()  # beside its segment, as far as measured
    damage: str = ""


def default_root() -> Path:
    """Return $PW_CACHE/engines, or the default below the user's cache directory."""
    cache = os.environ.get("PW_CACHE")
    if cache:
        return Path(cache) / "engines"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pixelwizard" / "engines"


class EngineStore:
    """A folder of engines. Nothing is created before the first build."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = default_root() if root is None else root

    def find(self, key: EngineKey) -> Lookup:
        """Return the verified file of an engine, or the reason why it has to be built.

        Raises StoreError for a store that others own or can write to.
        """
        self._require_trusted()
        folder = self.root / key.folder
        if not folder.is_dir():
            return Lookup(state="missing", reason="not built yet")
        manifest, damage = read_manifest(folder)
        if not damage and manifest["key"] != _as_json(key):
            damage = "its manifest has another key"
        if not damage:
            damage = _verify(folder, manifest)
        if damage:
            return Lookup(state="damaged", reason=f"{folder}: {damage}")
        path = folder / manifest["file"]
        return Lookup(state="fresh", path=path, speeds=speeds_of(manifest))

    def holds(self, prefix: str) -> bool:
        """Tell whether there is anything for segments whose names begin with `prefix`."""
        return any(self.root.glob(f"{prefix}*"))

    @contextmanager
    def locked(self, key: EngineKey, *, wait: bool = True) -> Iterator[bool]:
        """Lock an engine for building; yields False if another process has it (wait=False).

        The lock is released when its holder exits, however it ends. Raises StoreError.
        """
        self.make_root()
        with _lock(self.root / ".locks" / key.folder, wait=wait) as mine:
            yield mine

    @contextmanager
    def publishing(self, key: EngineKey, name: str) -> Iterator[Path]:
        """Yield the path of a file to build; publish the engine when the block succeeds.

        Call with the lock held. If the block fails or the process dies, nothing is published.
        Raises StoreError where the disk fails.
        """
        self.make_root()
        try:
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=self.root))
        except OSError as error:
            raise StoreError(
                f"cannot build in {self.root}: {error.strerror}; set PW_CACHE to another folder"
            ) from error
        descriptor = os.open(building, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # for `remove_leftovers`: in progress
        try:
            start = time.monotonic()
            yield building / name
            seconds = time.monotonic() - start
            try:
                _publish(building, self.root / key.folder, key, name, seconds)
            except OSError as error:
                raise StoreError(
                    f"cannot publish {key.folder} in {self.root}: {error.strerror or error}; "
                    "free some space or set PW_CACHE to another folder"
                ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
            os.close(descriptor)

    def record(self, key: EngineKey, speed: Speed) -> None:
        """Add a measurement to a built engine's manifest.

        It replaces an earlier one of the same size on the same number of threads.

        Raises StoreError where the engine is not there, or the disk fails.
        """
        folder = self.root / key.folder
        with self.locked(key):
            manifest, damage = read_manifest(folder)
            if damage or manifest["key"] != _as_json(key):
                raise StoreError(f"{folder}: {damage or 'its manifest has another key'}")
            known = {one.conditions: one for one in (*speeds_of(manifest), speed)}
            speeds = [asdict(one) for _, one in sorted(known.items())]
            partial = folder / f".{MANIFEST}.partial"
            try:
                write_manifest(partial, manifest | {"speeds": speeds})
                partial.rename(folder / MANIFEST)
                sync(folder)
            except OSError as error:
                raise StoreError(
                    f"cannot write the speed of {key.folder} in {self.root}: "
                    f"{error.strerror or error}; free some space or set PW_CACHE to another folder"
                ) from error

    def entries(self, *, verify: bool) -> list[Entry]:
        """List everything in the store, by name; `verify` compares every file with its digest."""
        return [_entry(folder, verify) for folder in self._folders()]

    def remove(self, folder: str) -> None:
        """Remove an engine, by the name of its entry. Raises StoreError for any other name."""
        # A path, joined to the root, could lead anywhere, and all of it would be deleted.
        if folder not in {path.name for path in self._folders()}:
            raise StoreError(f"{folder!r} is not an engine of {self.root}; name one of its entries")
        try:
            shutil.rmtree(self.root / folder)
        except OSError as error:
            raise StoreError(f"cannot remove {self.root / folder}: {error.strerror}") from error

    def prune(self, reason_of: Callable[[Entry], str | None]) -> Iterator[tuple[str, str | None]]:
        """Remove the engines that there is a reason to; yield the name and the reason of each.

        Each is verified while it is locked, so that the reason holds for what is removed. One that
        another process has locked stays, and its reason is None. Raises StoreError.
        """
        for folder in self._folders():
            with _lock(self.root / ".locks" / folder.name, wait=False) as mine:
                if not folder.is_dir():  # removed by another process meanwhile
                    continue
                reason = reason_of(_entry(folder, verify=True)) if mine else None
                if reason:
                    self.remove(folder.name)
            if reason or not mine:
                yield folder.name, reason

    def remove_leftovers(self) -> list[Path]:
        """Remove the folders of killed builds; return their paths. Raises StoreError."""
        removed = []
        for path in sorted(self.root.glob(".building-*")) if self.root.is_dir() else []:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # its build has just finished
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                removed.append(path)
            except BlockingIOError:  # its build is running
                continue
            except OSError as error:
                raise StoreError(f"cannot remove {path}: {error.strerror}") from error
            finally:
                os.close(descriptor)
        return removed

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")

    def make_root(self) -> None:
        """Create the folder, for this user alone, if it does not exist. Raises StoreError."""
        try:
            make_private(self.root)
        except OSError as error:
            raise StoreError(
                f"cannot create the engine store {self.root}: {error.strerror}; "
                "set PW_CACHE to another folder"
            ) from error
        self._require_trusted()

    def _require_trusted(self) -> None:
        if fault := distrust(self.root):
            raise StoreError(
                f"the engine store {self.root} is not used: an engine is a program, and "
                f"{fault.reason}; look at what is in it, then `{fault.remedy}`, or set PW_CACHE to "
                "another folder (--policy eager uses no engines)"
            )


def _publish(building: Path, folder: Path, key: EngineKey, name: str, seconds: float) -> None:
    """Write the manifest, sync everything to disk, rename the folder into place."""
    path = building / name
    manifest = {
        "format": FORMAT,
        "file": name,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "seconds": round(seconds, 3),
        "key": asdict(key),
    }
    write_manifest(building / MANIFEST, manifest)
    for written in (path, building):
        sync(written)
    if folder.exists():  # damaged; rename cannot replace a folder that is not empty
        shutil.rmtree(folder)
    building.rename(folder)
    sync(folder.parent)


def _verify(folder: Path, manifest: dict[str, Any]) -> str:
    """Describe what is wrong with the engine's file; empty if nothing is."""
    path = folder / manifest["file"]
    if owner := foreign(folder) or foreign(path):
        return owner
    try:
        if path.exists() and not path.is_file():
            return f"{path.name} is not a file"
        size = path.stat().st_size
        if size != manifest["bytes"]:
            return f"{path.name} has {size} bytes, expected {manifest['bytes']}"
        if _sha256(path) != manifest["sha256"]:
            return f"{path.name} is not the file that was published (SHA-256 differs)"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return ""


def _entry(folder: Path, verify: bool) -> Entry:
    manifest, damage = read_manifest(folder)
    if verify and not damage:
        damage = _verify(folder, manifest)
    key = manifest.get("key", {})
    size = 0
    try:
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # `record` has just renamed its partial file
                size += path.lstat().st_size
    except OSError as error:
        damage = damage or f"it cannot be read ({error.strerror})"
    return Entry(
        folder=folder.name,
        segment=key.get("spec", {}).get("segment", "?"),
        backend=key.get("backend", "?"),
        bytes=size,
        seconds=manifest.get("seconds", 0.0),
        key=key,
        speeds=speeds_of(manifest),
        damage=damage,
    )


def _as_json(key: EngineKey) -> Any:
    """Return the key as read back from a manifest: with lists for tuples."""
    return json.loads(json.dumps(asdict(key)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a file that is made if need be; yields False if another process has it (wait=False)."""
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise StoreError(f"cannot lock {path}: {error.strerror}") from error
    try:
        mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)
