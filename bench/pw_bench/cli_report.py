# SPDX-License-Identifier: Apache-2.0
"""`pw bench report`: results files as a page, as tables, as lines."""

from __future__ import annotations

from pathlib import Path

import click

from pw_runtime.cli.options import DONE, FILE
from pw_runtime.errors import BadRequest


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@click.option("--out", type=FILE, required=True, help="HTML page, which needs no other file.")
@click.option("--markdown", "markdown_file", type=FILE, help="Also write tables for a README.")
@click.option("--json-lines", "lines_file", type=FILE, help="Also write a line for every figure.")
def report(
    files: tuple[Path, ...], out: Path, markdown_file: Path | None, lines_file: Path | None
) -> int:
    """Show what results files of `pw bench` say."""
    from pw_bench.report import json_lines, markdown, write_html
    from pw_bench.results import read_result
    from pw_runtime.system.atomic_files import write_text

    written = [one for one in (out, markdown_file, lines_file) if one is not None]
    named = [one.resolve() for one in (*files, *written)]
    for one in written:
        if named.count(one.resolve()) > 1:
            raise BadRequest(
                f"{one} is named twice",
                wanted="a file of its own for the page, the tables and the lines",
                do="give one of them another name",
            )
    results = [read_result(one) for one in files]
    write_html(results, out)
    if markdown_file is not None:
        write_text(markdown_file, markdown(results))
    if lines_file is not None:
        write_text(lines_file, json_lines(results))
    return DONE
