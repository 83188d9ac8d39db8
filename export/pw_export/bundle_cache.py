# SPDX-License-Identifier: Apache-2.0
"""Cache of bundles converted on the fly for the flags of the official command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pw_export.convert import convert_once
from pw_export.one_conversion import fingerprint
from pw_runtime.checkpoint.bundle import MANIFEST
from pw_runtime.system.trusted_folder import trusted_folder


def cached_bundle(
    *, wan: Path, draft: Path | None, highres: Path | None, say: Callable[[str], None]
) -> Path:
    """Return the bundle of these checkpoints, converting them on first use, once for all processes.

    It is stored in $PW_CACHE/bundles (default ~/.cache/pixelwizard/bundles) under a digest of
    path, size and modification time of every source file.

    Raises BadRequest, BadWeights and WriteFailed as `convert` does.
    """
    home = Path(os.environ.get("PW_CACHE") or Path.home() / ".cache" / "pixelwizard")
    bundle = trusted_folder(home / "bundles") / fingerprint(wan, draft, highres)
    if (bundle / MANIFEST).exists():
        say(f"using the bundle {bundle}, converted from {wan} by an earlier run")
        return bundle
    say(f"converting {wan} once, to {bundle}")
    convert_once(wan=wan, draft=draft, highres=highres, out=bundle, ema=False, say=say)
    return bundle
