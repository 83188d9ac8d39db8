# SPDX-License-Identifier: Apache-2.0
"""The reference of the command line, as Markdown, from the commands themselves."""

from __future__ import annotations

import html
from collections.abc import Iterator

import click

from pw_runtime.cli.verbs import cli


def reference() -> str:
    """Return a section for every command of `pw`: what it does, usage, options."""
    return "\n\n".join(part for context in _contexts(cli, "pw", None) for part in _section(context))


def _contexts(
    command: click.Command, name: str, above: click.Context | None
) -> Iterator[click.Context]:
    """Yield a context of the command and of every one below it, in alphabetical order."""
    context = click.Context(command, info_name=name, parent=above, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for below in sorted(command.commands):
            yield from _contexts(command.commands[below], below, context)


def _section(context: click.Context) -> Iterator[str]:
    command, words = context.command, context.command_path
    yield f"{'#' * min(4, 1 + len(words.split()))} `{words}`"
    yield from map(_line, (command.help or "").split("\n\n"))
    yield f"```\n{' '.join([words, *command.collect_usage_pieces(context)])}\n```"
    if isinstance(command, click.Group):
        return
    records = (option.get_help_record(context) for option in command.get_params(context))
    rows = [f"| {_names(names)} | {_line(text)} |" for names, text in filter(None, records)]
    yield "\n".join(["| option | meaning |", "| --- | --- |", *rows])


def _line(text: str) -> str:
    """Return a text as one line, in which <, [ and | are characters."""
    line = html.escape(" ".join(text.split()), quote=False)
    return line.replace("[", "\\[").replace("|", "\\|")


def _names(text: str) -> str:
    """Return the names of an option, and what it takes: a name is not broken, choices are."""
    *others, last = text.split(", -")
    name, _, value = last.partition(" ")
    names = [other if n == 0 else f"-{other}" for n, other in enumerate([*others, name])]
    codes = [f'<code class="name">{_line(name)}</code>' for name in names]
    codes += [f"<code>{_line(value).replace('|', '|<wbr>')}</code>"] * bool(value)
    return "<br>".join(codes)
