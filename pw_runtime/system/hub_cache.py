# SPDX-License-Identifier: Apache-2.0
"""Models by their names in the local cache of Hugging Face's hub; nothing is downloaded.

    HUB/models--ORG--NAME/refs/main              the commit of the branch
    HUB/models--ORG--NAME/snapshots/<commit>/    its files, as links into blobs/

Imports the standard library alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from pw_runtime.errors import BadRequest
from pw_runtime.system.input_files import UnreadableInput, read_text

_PART: Final = r"[A-Za-z0-9_][\w.-]*"
_NAME: Final = re.compile(rf"({_PART})/({_PART})((?:/{_PART})*)", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{7,64}")
_REPOSITORY: Final = "models--"
_FILES: Final = (".pt", ".pth", ".safetensors")  # endings that no model's name has
_MAX_REF: Final = 1024  # bytes


def hub_cache() -> Path:
    """Return the folder that `hf download` fills, by the variables that it goes by."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or Path(home) / "hub").expanduser()


def find_model(name: str) -> Path:
    """Return the path that a name means: a path that exists, or ORG/NAME[/FILE] in the hub's cache.

    A model's folder in that cache means its snapshot. Any other name is returned as a path: whoever
    opens it says what is missing there.

    Raises BadRequest where ORG/NAME is neither a path nor in the cache, or there incompletely.
    """
    path = Path(name)
    if os.path.exists(path):  # which Path.exists cannot tell of a folder that may not be searched
        return _snapshot(path, path.name) if _is_repository(path) else path
    match = _NAME.fullmatch(name)
    if match is None:
        return path
    organisation, model, below = match.groups()
    repository = hub_cache() / f"{_REPOSITORY}{organisation}--{model}"
    download = f"hf download {organisation}/{model}" + below.replace("/", " ", 1)
    if not _is_repository(repository):
        if os.path.exists(organisation) or model.endswith(_FILES):
            return path  # a path with a slip in it
        raise BadRequest(
            f"there is no model {name}",
            got=f"no such path, and no {repository.name} in {repository.parent}",
            wanted="a folder, or a name in the local cache of Hugging Face's hub",
            do=f"check the path; for a model of the hub run `{download}` first, which needs "
            "`pip install huggingface_hub`",
        )
    found = _snapshot(repository, f"{organisation}/{model}") / below.lstrip("/")
    if not found.exists():
        raise BadRequest(
            f"{organisation}/{model} is in the cache without {below.lstrip('/')}",
            got=f"no {found}",
            do=f"run `{download}`",
        )
    return found


def in_hub_cache(path: Path) -> bool:
    """Tell whether a path is a snapshot of a model, or below one."""
    return any(
        x.parent.name == "snapshots" and _is_repository(x.parent.parent)
        for x in (path, *path.parents)
    )


def _is_repository(path: Path) -> bool:
    return path.name.startswith(_REPOSITORY) and (path / "snapshots").is_dir()


def _snapshot(repository: Path, name: str) -> Path:
    """Return the snapshot of a repository's branch main, or its only one. Raises BadRequest."""
    snapshots = repository / "snapshots"
    try:
        commit = read_text(repository / "refs" / "main", _MAX_REF).strip()
        if not _COMMIT.fullmatch(commit):
            raise UnreadableInput(f"{ascii(commit)[:40]} is no commit")
        found = snapshots / commit
    except UnreadableInput as error:
        only = sorted(x for x in snapshots.iterdir() if x.is_dir())
        if len(only) != 1:
            raise BadRequest(
                f"{name} is in {repository} without a branch main",
                got=f"refs/main: {error}; {len(only)} snapshots",
                do=f"give the path of one: {snapshots}/...",
            ) from error
        found = only[0]
    missing = [x for x in sorted(found.rglob("*")) if x.is_symlink() and not x.exists()]
    if missing or not found.is_dir():
        lacking = missing[0].relative_to(found) if missing else "the snapshot"
        raise BadRequest(
            f"{name} is incomplete in the cache",
            got=f"{found}, without {lacking}",
            do="run `hf download` for it again",
        )
    return found
