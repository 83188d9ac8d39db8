# SPDX-License-Identifier: Apache-2.0
"""The options --verbose and --log-file, for verbs that run long: where the log goes.

Everything a reporter says goes to the logger `pw_runtime`; these options give it handlers, which
stay until the process has said how it ended.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from pw_runtime.cli.options import FILE
from pw_runtime.errors import BadRequest
from pw_runtime.system.printable import printable

if TYPE_CHECKING:
    import logging

Command = TypeVar("Command", bound=Callable[..., Any])
LINE: Final = "%(asctime)s.%(msecs)03d %(levelname)s %(process)d: %(message)s"
TIME: Final = "%Y-%m-%d %H:%M:%S"  # local

_handlers: list[logging.Handler] = []


def logging_options(command: Command) -> Command:
    """Add -v, --verbose and --log-file to a verb, which need not do anything about them."""
    to_file = click.option(
        "--log-file",
        type=FILE,
        expose_value=False,
        callback=_log_to_file,
        help="Append everything that is said, with the time, to this file.",
    )
    verbose = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        is_eager=True,  # before --log-file, which then has the details too
        expose_value=False,
        callback=_log_details,
        help="Also print details: times and memory of every part. They go to --log-file too.",
    )
    return verbose(to_file(command))


def _log_details(context: click.Context, option: click.Parameter, verbose: bool) -> None:
    if not verbose:
        return
    import logging

    class Details(logging.Handler):
        """Prints what the reporter does not."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno < logging.INFO:  # a progress bar may have replaced sys.stderr
                print(printable(record.getMessage()), file=sys.stderr, flush=True)

    _add(Details(), logging.DEBUG)


def _log_to_file(context: click.Context, option: click.Parameter, file: Path | None) -> None:
    if file is None:
        return
    import logging
    from importlib.metadata import PackageNotFoundError, version

    class Lines(logging.Formatter):
        """Keeps a record to what a terminal may be shown."""

        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    class Appended(logging.FileHandler):
        """Writes every record at once; where the disk refuses one, says so and ends."""

        def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
            failure, stream, self.stream = sys.exc_info()[1], self.stream, None
            logger().removeHandler(self)
            with suppress(OSError):  # it writes again what was refused
                if stream is not None:
                    stream.close()
            print(f"cannot write to {file}: {failure}; the log ends here", file=sys.stderr)

    try:
        handler = Appended(file, encoding="utf-8")
    except OSError as error:
        raise BadRequest(
            f"cannot write the log file {file}",
            got=error.strerror,
            do="give --log-file another name, in a folder that exists",
        ) from error
    handler.setFormatter(Lines(LINE, TIME))
    _add(handler, logging.INFO)
    try:
        ours = version("pixelwizard-runtime")
    except PackageNotFoundError:
        ours = "running from source"
    words = shlex.join(["pw", *sys.argv[1:]])
    logger().info("%s (%s, Python %s)", words, ours, sys.version.split()[0])


def logger() -> logging.Logger:
    """Return the logger of everything that is said."""
    import logging

    return logging.getLogger("pw_runtime")


def _add(handler: logging.Handler, level: int) -> None:
    _handlers.append(handler)
    logger().addHandler(handler)
    logger().setLevel(level if len(_handlers) == 1 else min(level, logger().level))


def error(text: str) -> None:
    """Write a line about how the process ends, where there is a log."""
    if _handlers:
        logger().error(text)


def close() -> None:
    """Take the handlers away again."""
    while _handlers:
        handler = _handlers.pop()
        logger().removeHandler(handler)
        handler.close()
        if not _handlers:
            logger().setLevel(0)
