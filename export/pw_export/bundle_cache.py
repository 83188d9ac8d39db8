# SPDX-License-Identifier: Apache-2.0
"""Cache of bundles made on the fly: of the official command line's flags, and the built-in model.

They are in $PW_CACHE/bundles (default ~/.cache/pixelwizard/bundles), each made once for all
processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pw_export.convert import convert_once
from pw_export.one_conversion import fingerprint, one_conversion
from pw_runtime.checkpoint.bundle import FORMAT, MANIFEST
from pw_runtime.system.places import cache_root, check_cache, temporary_folder
from pw_runtime.system.trusted_folder import trusted_folder


def cached_bundle(
    *, wan: Path, draft: Path | None, highres: Path | None, say: Callable[[str], None]
) -> Path:
    """Return the bundle of these checkpoints, converting them on first use.

    It is stored under a digest of path, size and modification time of every source file.

    Raises BadRequest, BadWeights and WriteFailed as `convert` does.
    """
    bundle = _bundles() / f"{FORMAT}-{fingerprint(wan, draft, highres)}"
    if (bundle / MANIFEST).exists():
        say(f"using the bundle {bundle}, converted from {wan} by an earlier run")
        return bundle
    say(f"converting {wan} once, to {bundle}")
    convert_once(wan=wan, draft=draft, highres=highres, out=bundle, ema=False, say=say)
    return bundle


def demo_bundle(say: Callable[[str], None]) -> Path:
    """Return the bundle of the built-in model, made on first use from the weights of the package.

    Raises BadRequest and WriteFailed where it cannot be stored.
    """
    from pw_export.nano.weights import TRAINED, write_trained_checkpoint

    weights = fingerprint(TRAINED, None, None)
    bundle = _bundles() / f"built-in-{FORMAT}-{weights}"
    if (bundle / MANIFEST).exists():
        return bundle
    checkpoint = bundle.with_name(f"{bundle.name}.checkpoint")  # names the lock alone
    with one_conversion(checkpoint, weights, say):
        if (bundle / MANIFEST).exists():
            return bundle
        say(f"writing the built-in model once, to {bundle}")
        with TemporaryDirectory(prefix="pw-demo-", dir=temporary_folder()) as work:
            wan = Path(work) / "checkpoint"
            write_trained_checkpoint(wan)
            highres = wan / "pixelwizard" / "highres.pt"
            convert_once(
                wan=wan, draft=None, highres=highres, out=bundle, ema=False, say=lambda line: None
            )
    return bundle


def _bundles() -> Path:
    folder = cache_root() / "bundles"
    check_cache(folder)
    return trusted_folder(folder)
