# SPDX-License-Identifier: Apache-2.0
"""Cache of bundles converted on the fly for the flags of the official command line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pw_export.convert import convert
from pw_runtime.checkpoint.bundle import MANIFEST


def cached_bundle(
    *, wan: Path, draft: Path | None, highres: Path | None, say: Callable[[str], None]
) -> Path:
    """Return the bundle of these checkpoints, converting them on first use.

    It is stored in $PW_CACHE/bundles (default ~/.cache/pixelwizard/bundles) under a digest of
    path, size and modification time of every source file.

    Raises BadRequest, BadWeights and WriteFailed as `convert` does.
    """
    home = Path(os.environ.get("PW_CACHE") or Path.home() / ".cache" / "pixelwizard")
    bundle = home / "bundles" / _fingerprint(wan, draft, highres)
    if (bundle / MANIFEST).exists():
        say(f"using the bundle {bundle}, converted from {wan} by an earlier run")
        return bundle
    say(f"converting {wan} once, to {bundle}")
    convert(wan=wan, draft=draft, highres=highres, out=bundle, say=say)
    return bundle


def _fingerprint(wan: Path, draft: Path | None, highres: Path | None) -> str:
    digest = hashlib.sha256()
    for role, source in (("wan", wan), ("draft", draft), ("highres", highres)):
        if source is None:
            continue
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for file in files:
            if file.is_file():
                state = file.stat()
                name = file.resolve()
                digest.update(f"{role}\0{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]
