# SPDX-License-Identifier: Apache-2.0
"""Prompt files of others: what is refused, and that no character of them drives a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.prompts import MAX_CHARACTERS, make_prompts, read_prompts
from pw_runtime.system.input_files import UnreadableInput, parse_json
from pw_runtime.system.printable import printable
from pw_runtime.system.progress import Reporter

# One of each kind: C0, DEL, C1, marks of direction, overrides, isolates, annotations, surrogates.
UNSAFE = "\x00\x07\x08\r\x1b\x7f\x80\x9b\x9d\u061c\u200e\u202a\u202e\u2066\u2069\ufff9\ud800"


@pytest.mark.parametrize("character", UNSAFE + "\t\n\u2028\u2029")
def test_an_id_with_a_control_character_is_refused_and_shown_escaped(character: str) -> None:
    with pytest.raises(BadRequest, match="cannot name a file") as caught:
        make_prompts([(f"a{character}b", "a cat")])
    assert printable(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cat", "CAT"),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("CAF\u00c9", "cafe\u0301"),
        ("\u212b", "\u00e5"),  # the sign of the unit, and the letter
    ],
)
def test_ids_that_some_file_systems_cannot_tell_apart_are_refused(first: str, second: str) -> None:
    with pytest.raises(BadRequest, match="by case or by Unicode's normal form alone"):
        make_prompts([(first, "x"), ("other", "x"), (second, "y")])


@pytest.mark.parametrize("name", ["cat", "第一", "été", "a b", "Ω", "🎈", "v1.2", "نمونه‌ای"])
def test_ordinary_names_are_kept(name: str) -> None:
    assert make_prompts([(name, "x"), ("dog", "y")])[0].id == name


def test_an_id_that_is_used_twice_is_named() -> None:
    with pytest.raises(BadRequest, match="two prompts have the id 'a'"):
        make_prompts([("b", "x"), ("a", "x"), ("a", "y")])


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"text": NaN}',
        '{"text": 5}',
        '{"text": ""}',
        '{"text": null}',
        '{"id": NaN, "text": "x"}',
        '{"id": 1e999, "text": "x"}',
        '{"id": [], "text": "x"}',
        '{"id": true, "text": "x"}',
        '{"id": 1' + "0" * 5000 + ', "text": "x"}',
        '{"id": 1' + "0" * 300 + ', "text": "x"}',
        '{"id": "", "text": "x"}',
        '{"id": "\\u0000", "text": "x"}',
        '{"id": "\\ud800", "text": "x"}',
        '{"text": "\\ud800"}',
        '{"text": "' + "x" * (MAX_CHARACTERS + 1) + '"}',
        '{"text": "x"} trailing',
        '{"text": ' + "[" * 65 + "]" * 65 + "}",
    ],
)
def test_a_line_that_is_no_prompt_is_one_error(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(BadRequest) as caught:
        read_prompts(file)
    assert len(str(caught.value)) < 1000


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_no_control_character_reaches_the_screen(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb")
    reporter = Reporter()
    for character in UNSAFE:
        reporter.say(f"said {character}[31m")
        reporter.warn(f"warned {character}[31m")
        with reporter.steps(f"step {character}]0;", 1) as advance:
            advance()
    shown = stream.getvalue()
    assert "\\x9b[31m" in shown
    assert "\\u202e[31m" in shown
    assert not set(shown) & set(UNSAFE) - {"\x1b", "\r"}  # rich's own, on a terminal
    assert "\x1b]0;" not in shown
    assert "\x1b[31m" not in shown


def test_paths_are_printed_exactly_for_scripts_and_escaped_for_people(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream, expected in ((io.StringIO(), "a\x1bb\n"), (Terminal(), "a\\x1bb\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        Reporter().finished(Path("a\x1bb"))
        assert stream.getvalue() == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_ends_them(tmp_path: Path, end: str) -> None:
    (tmp_path / "p.txt").write_bytes(end.join(["a cat", "", "a dog", ""]).encode())
    prompts = read_prompts(tmp_path / "p.txt")
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("0", "a cat"), ("2", "a dog")]


@pytest.mark.parametrize("text", ["1e999", "-1e999", "[1, 2e400]", "9" * 5000, '{"a": -1e500}'])
def test_numbers_that_nothing_stores_are_refused_in_our_words(text: str) -> None:
    with pytest.raises(UnreadableInput) as caught:
        parse_json(text)
    assert "sys." not in str(caught.value)
    assert "larger than any number" in str(caught.value) or "digits" in str(caught.value)


def test_a_picture_that_is_null_is_none_and_one_that_is_no_path_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a cat", "image": null, "draft_video": "a.mp4"}\n')
    prompt = read_prompts(path, lambda line: None)[0]
    assert (prompt.image, prompt.draft_video) == (None, tmp_path / "a.mp4")
    path.write_text('{"text": "a cat", "image": 7}\n')
    with pytest.raises(BadRequest, match="has an unusable image"):
        read_prompts(path, lambda line: None)


def test_keys_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    """Seen: a seed for each prompt was ignored without a word."""
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"id": "a", "text": "a cat", "seed": 7}\n{"prompt": "a dog", "caption": "x", "seed": 8}\n',
        encoding="utf-8",
    )
    told: list[str] = []
    prompts = read_prompts(file, told.append)
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog"]
    assert told == [f"{file} has keys that are not used: seed, caption"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '[\n{"id": "a", "text": "x"}\n]'),
        ("p.txt", '[{"id": "a", "text": "x"},\n {"id": "b", "text": "y"}]'),
        ("p.csv", "id,prompt\na,a cat"),
        ("P.TSV", "a\ta cat"),
    ],
)
def test_a_table_or_a_list_is_no_file_of_prompts(tmp_path: Path, name: str, content: str) -> None:
    """Seen: a clip of each bracket."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadRequest, match="is a table or a list"):
        read_prompts(path)


def test_a_prompt_may_begin_with_a_bracket(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("[close up] a cat\n[wide] a dog")
    assert [prompt.text for prompt in read_prompts(path)] == ["[close up] a cat", "[wide] a dog"]
