# SPDX-License-Identifier: Apache-2.0
"""`pw verify`: what is missing or altered among clips, receipts, latents and their bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.cli.json_output import json_text
from pw_runtime.cli.options import FILE, MODEL, json_option

if TYPE_CHECKING:
    from pw_runtime.job.verify import Verdict


@click.command()
@click.argument("paths", metavar="CLIP|RECEIPT|DIR...", nargs=-1, required=True, type=FILE)
@click.option("--model", type=MODEL, help="Also check this bundle, and that it made the clips.")
@json_option
def verify(paths: tuple[Path, ...], model: Path | None, as_json: bool) -> int:
    """Check clips against their receipts: files, digests, frames, latents, leftovers.

    Ends with 0 where everything is as the receipts say, and with 3 where something is not.
    """
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.job.verify import verify_all

    bundle = None if model is None else open_bundle(model)
    verdicts = []
    for verdict in verify_all(paths, bundle):
        verdicts.append(verdict)
        if not as_json:
            _say(verdict)
    faulty = sum(bool(verdict.faults) for verdict in verdicts)
    if as_json:
        report = {"checked": [asdict(verdict) for verdict in verdicts], "faulty": faulty}
        click.echo(json_text(report))
    else:
        clips = len(verdicts) - (bundle is not None)
        click.echo(f"{clips} {'clip' if clips == 1 else 'clips'} checked: {_total(faulty)}")
    return SOME_FAILED if faulty else DONE


def _say(verdict: Verdict) -> None:
    from pw_runtime.system.printable import printable

    found = "; ".join(map(str, verdict.faults)) or f"as it should be, {verdict.content}"
    unchecked = f" (not checked: {'; '.join(verdict.unchecked)})" if verdict.unchecked else ""
    click.echo(printable(f"{verdict.name}: {found}{unchecked}"))


def _total(faulty: int) -> str:
    return f"something is wrong with {faulty}" if faulty else "nothing is missing or altered"
