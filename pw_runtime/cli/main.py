# SPDX-License-Identifier: Apache-2.0
"""Entry point of `pw`: runs the command line and turns every ending into an exit code.

Imports the standard library alone, so that it can say which package is missing.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from pw_runtime.cli.exit_codes import BAD_INPUT, DONE, INTERRUPTED, SOME_FAILED, exit_code_of
from pw_runtime.errors import BadRequest, PixelWizardError
from pw_runtime.system.packages import missing_package
from pw_runtime.system.printable import printable
from pw_runtime.system.streams import EnduringStream, open_missing_streams

ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


def main() -> None:
    """Entry point of the `pw` command; ends the process with one of the documented codes."""
    # OpenMP reads this when torch loads. By default waiting threads spin, and on a machine that has
    # anything else to do, the decode then takes two to five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        _print_everything(stream)
    before = sys.stdout, sys.stderr
    output = EnduringStream(sys.stdout)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, EnduringStream(sys.stderr))
    try:
        code = _ended()
        output.flush()
        if output.failure is not None:
            _say(
                f"error: cannot write to the standard output\n  got: {output.failure}\n"
                "  do this: send it to a file on a disk with room; clips and files are not touched"
            )
            code = code or SOME_FAILED
    except Exception:
        if not _waits_for_a_rank():
            raise
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout, sys.stderr = before
        if log := sys.modules.get("pw_runtime.cli.log"):
            log.close()
    for number in ENDING:
        if signal.getsignal(number) is pass_over:
            signal.signal(number, signal.SIG_IGN)  # Python's own end sooner than the process
    if _waits_for_a_rank():
        for stream in before:
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _waits_for_a_rank() -> bool:
    """Tell whether a library would wait for a rank that is gone, or abort, at an ordinary end."""
    ranks = sys.modules.get("pw_runtime.system.ranks")
    return ranks is not None and bool(ranks.broken())


def _ended() -> int:
    """Run the command line; return the exit code of its ending, which is told if it is no good."""
    if "PW_PARENT_PID" in os.environ:  # a benchmark started this process
        from pw_engines.child import end_with_parent

        end_with_parent()
    try:
        with _ending_on(signal.SIGTERM, signal.SIGHUP):
            _require_current_folder()
            code = _run()
    except KeyboardInterrupt:
        _say("interrupted: what was finished is kept, partial files are removed")
        code = INTERRUPTED
    except Terminated as ended:
        name = signal.Signals(ended.number).name
        _say(f"ended by {name}: what was finished is kept, partial files are removed")
        code = 128 + ended.number
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        _say(f"error: {missing}")
        code = BAD_INPUT
    except Exception as error:
        if not _is_expected(error):
            raise
        _say(f"error: {error}")
        code = exit_code_of(error)
    return code


def _run() -> int:
    """Run the verb that the command line names; return its exit code."""
    try:
        import click

        from pw_runtime.cli.verbs import cli
    except ModuleNotFoundError as error:
        as_json = sys.argv[1:] == ["doctor", "--json"]
        if not (as_json or sys.argv[1:] == ["doctor"]) or missing_package(error) is None:
            raise
        from pw_runtime.cli.doctor import report  # it does without the package

        print(report(as_json=as_json))
        return DONE
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        _say(usage.getvalue().rstrip("\n"))
        return BAD_INPUT
    except click.Abort as error:
        raise KeyboardInterrupt from error
    return code if isinstance(code, int) else DONE


def _require_current_folder() -> None:
    """Raise BadRequest where the current folder was removed: libraries then fail to load."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise BadRequest(
            "the current folder does not exist any more", do="change to another folder"
        ) from error


def _say(text: str) -> None:
    """Print a line on stderr, and write it to the log, if there is one."""
    print(printable(text), file=sys.stderr, flush=True)
    if log := sys.modules.get("pw_runtime.cli.log"):
        log.error(text)


def _print_everything(stream: TextIO) -> None:
    """Let a stream escape the characters that its encoding lacks, where it would fail."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


class Terminated(BaseException):
    """A signal asks the process to end; it unwinds as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def pass_over(number: int, frame: FrameType | None) -> None:
    """Do nothing on a signal that comes while the process ends.

    In place of SIG_IGN: for a signal that came just before its handler was replaced by that,
    Python prints a traceback out of whatever runs at that time.
    """


def restore(before: Mapping[signal.Signals, Handler]) -> None:
    """Give signals their former handlers back, but those that are passed over until the end."""
    for number, handler in before.items():
        if signal.getsignal(number) is not pass_over:
            signal.signal(number, handler)


@contextmanager
def _ending_on(*signals: signal.Signals) -> Iterator[None]:
    """Raise Terminated in the main thread on these signals, unless they are ignored (nohup)."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in signals:  # a second one must not interrupt the unwinding
            signal.signal(each, pass_over)
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        restore(before)


def _is_expected(error: Exception) -> bool:
    """Tell whether an error's message is meant for the user."""
    if isinstance(error, PixelWizardError):
        return True
    engines = sys.modules.get("pw_engines")  # importing it takes seconds; who raised it has done so
    return engines is not None and isinstance(error, engines.EngineError | engines.StoreError)
