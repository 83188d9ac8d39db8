# SPDX-License-Identifier: Apache-2.0
"""--log-file and --verbose: everything that is said is kept, and what is printed stays the same."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pw_runtime import Reporter
from tests.e2e.pw import Ended, Pw

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR) (\d+): (.*)")


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--prompt", "a cat", "--draft-only", "--fresh", "--device", "cpu",
            "--negative", "blur", *arguments,
        )  # fmt: skip

    return run


def records(file: Path) -> list[tuple[str, str]]:
    """Return level and text of every record."""
    lines = file.read_text(encoding="utf-8").splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    return [(found[1], found[3]) for found in matches if found]


def test_the_log_has_what_was_said_and_a_quiet_run_is_still_logged(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    log = tmp_path / "pw.log"
    quiet = generate("--quiet", "--log-file", log)
    assert (quiet.code, quiet.err) == (0, "")
    told = records(log)
    assert {level for level, _ in told} == {"INFO"}
    texts = [text for _, text in told]
    assert texts[0].startswith("pw generate --model ")
    assert texts[-1] == f"finished: {tmp_path / 'out' / '0.mp4'}"
    assert sum(text.startswith("draft 0: 0/2; whole run: ") for text in texts) == 1
    told_twice = tmp_path / "loud.log"
    loud = generate("--log-file", told_twice)
    progress = re.compile(r"(text|draft 0|decode 0): \d/\d in ")
    said = {line for line in loud.err.splitlines() if not progress.match(line)}
    assert len(said) > 3
    assert said <= {text for _, text in records(told_twice)}


def test_a_second_run_appends_and_an_error_is_in_the_log(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    log = tmp_path / "pw.log"
    generate("--log-file", log)
    before = log.read_text(encoding="utf-8")
    ended = generate("--log-file", log, "--prompt", "")
    assert ended.code == 2
    after = log.read_text(encoding="utf-8")
    assert after.startswith(before)
    assert ("ERROR", "error: --prompt is empty") in records(log)
    assert "describe what the clip should show" in after


def test_verbose_prints_times_and_memory_and_the_log_has_them_too(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    log = tmp_path / "pw.log"
    plain, verbose = generate(), generate("-v", "--log-file", log)
    assert re.search(r"^draft took \d+\.\d{4} s$", verbose.err, re.MULTILINE)
    assert "peak memory of decode" in verbose.err
    assert "took" not in plain.err
    assert any(level == "DEBUG" and text.startswith("draft took") for level, text in records(log))


def test_handlers_do_not_outlive_the_command(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    log = tmp_path / "pw.log"
    generate("-v", "--log-file", log)
    size = log.stat().st_size
    generate()
    assert log.stat().st_size == size
    assert logging.getLogger("pw_runtime").level == logging.NOTSET
    kinds = [type(handler) for handler in logging.getLogger("pw_runtime").handlers]
    assert kinds == [logging.NullHandler]


def test_a_log_file_that_cannot_be_written_is_one_error(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = generate("--log-file", tmp_path / "no folder" / "pw.log")
    assert ended.code == 2
    assert "cannot write the log file" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_ends_and_the_clip_does_not(
    generate: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = generate("--log-file", "/dev/full")
    assert ended.code == 0, ended.err
    assert ended.err.count("the log ends here") == 1
    assert (tmp_path / "out" / "0.mp4").exists()


def test_what_was_logged_is_there_after_a_kill(tmp_path: Path) -> None:
    log = tmp_path / "pw.log"
    program = (
        "import os, signal, sys\n"
        "sys.argv[1:] = ['generate']\n"
        "from pw_runtime.cli.log import _log_to_file\n"
        "from pathlib import Path\n"
        "from pw_runtime import Reporter\n"
        f"_log_to_file(None, None, Path({str(log)!r}))\n"
        "Reporter(quiet=True).say('the last words')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert records(log)[-1] == ("INFO", "the last words")


def test_a_message_cannot_reach_the_terminal_through_the_log(tmp_path: Path, pw: Pw) -> None:
    log = tmp_path / "pw.log"
    pw("generate", "--preset", "nano", "--out", tmp_path, "--log-file", log, "--prompt", "\x1b[2J")
    assert "\x1b" not in log.read_text(encoding="utf-8")


def test_without_a_handler_nothing_is_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("pw_runtime").propagate = False  # as without pytest's own handler
    try:
        Reporter().warn("look out")
    finally:
        logging.getLogger("pw_runtime").propagate = True
    assert capsys.readouterr().err == "look out\n"


def test_a_program_that_configures_logging_gets_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="pw_runtime"):
        reporter = Reporter(quiet=True)
        reporter.say("said")
        reporter.warn("warned")
        reporter.finished(Path("0.mp4"))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "said"),
        ("WARNING", "warned"),
        ("INFO", "finished: 0.mp4"),
    ]


def test_no_handler_gets_what_a_terminal_may_not_be_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen: a lone surrogate, which the handler of another program could not encode."""
    with caplog.at_level(logging.INFO, logger="pw_runtime"):
        reporter = Reporter(quiet=True)
        reporter.say("a\ud800b")
        reporter.warn("c\x1bd")
    assert [record.getMessage() for record in caplog.records] == ["a\\ud800b", "c\\x1bd"]
