# SPDX-License-Identifier: Apache-2.0
"""`pw docs`: the pages that messages and help refer to, which are part of the package."""

from __future__ import annotations

import difflib
from pathlib import Path

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.errors import BadRequest

PACKAGE = Path(__file__).parents[1]


def pages() -> dict[str, Path]:
    """Return the pages by name, in order: "presets", "tutorials/first_clip"."""
    installed, checkout = PACKAGE / "docs", PACKAGE.parent / "docs"
    folder = installed if installed.is_dir() else checkout
    # docs/reference is filled from the code where the site is built.
    files = (file for file in folder.rglob("*.md") if file.parent.name != "reference")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(files)}


@click.command()
@click.argument("page", required=False)
def docs(page: str | None) -> int:
    """Print a page of the documentation (Markdown), or without a PAGE the list of them.

    Less of it at a time: pw docs presets | less
    """
    known = pages()
    if page is None:
        width = max(map(len, known), default=0)
        for name, file in known.items():
            title = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            click.echo(f"{name:{width}}  {title}")
        return DONE
    name = page.removeprefix("docs/").removesuffix(".md")
    if name not in known:
        near = difflib.get_close_matches(page, known)
        raise BadRequest(
            "there is no such page",
            got=page,
            wanted=f"for instance {' or '.join(near)}" if near else None,
            do="`pw docs` lists the pages",
        )
    click.echo(known[name].read_text(encoding="utf-8"), nl=False)
    return DONE
