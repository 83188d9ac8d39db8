# SPDX-License-Identifier: Apache-2.0
"""The documentation builds as a site: strictly, whole, and with nothing fetched from elsewhere."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import pw_runtime
from pw_runtime.cli.verbs import cli
from pw_runtime.presets import PRESETS
from pw_runtime.types import StageConfig

FETCHED = re.compile(r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(\w+:[^"'\s>]*)""")
LOADED = re.compile(r"""<link\b[^>]*\bhref=["']?(https?:[^"'\s>]*)""")
STYLED = re.compile(r"""(?:url\(|@import\s*)["']?(https?:[^"')\s]*)""")


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a dead link, a page that no menu has or an unknown name ends the build."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet",
         "--config-file", root / "docs" / "site" / "mkdocs.yml", "--site-dir", out],
        cwd=root, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def page(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


def commands(command: click.Command, *words: str) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(words), command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, *words, name)


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 40
    texts = {file: file.read_text(encoding="utf-8") for file in (*pages, *styles)}
    found = {
        str(file.relative_to(site)): FETCHED.findall(text) + LOADED.findall(text)
        if file.suffix == ".html"
        else STYLED.findall(text)
        for file, text in texts.items()
    }
    assert {file: addresses for file, addresses in found.items() if addresses} == {}


@pytest.mark.slow
def test_no_page_names_a_folder_of_the_machine_that_built_it(site: Path, root: Path) -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in site.rglob("*.html")}
    assert [file for file, text in texts.items() if str(root) in text] == []


@pytest.mark.slow
def test_every_verb_and_option_is_in_the_reference(site: Path) -> None:
    text = html.unescape(page(site, "reference/cli.html"))
    for words, command in commands(cli, "pw"):
        _, heading, section = text.partition(f'id="{words.replace(" ", "-")}"')
        assert heading, words
        section = re.split(r"<h\d", section)[0]
        options = [x for x in command.params if isinstance(x, click.Option) and not x.hidden]
        if not isinstance(command, click.Group):
            missing = [name for x in options for name in x.opts if f">{name}</code>" not in section]
            assert missing == [], words


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = page(site, "reference/python.html")
    names = set(pw_runtime.__all__) - {"__version__"}
    assert {name for name in names if f'id="pw_runtime.{name}"' not in text} == set()
    assert 'id="pw_runtime.Pipeline.__call__"' in text


@pytest.mark.slow
def test_links_out_of_the_folder_of_pages_lead_to_pages(site: Path) -> None:
    name = "findings/torch-embedding-on-meta-imports-the-compiler.sh.html"
    assert f'href="{name}"' in page(site, "log.html")
    assert "from_pretrained" in page(site, name)
    assert (site / "images" / "nano.png").exists()
    assert "<h1" in page(site, "index.html")


def test_the_table_of_presets_is_that_of_the_program(root: Path) -> None:
    def told(stage: StageConfig | None) -> str:
        if stage is None:
            return "none: the draft is the clip"
        return f"{stage.width}x{stage.height}, {stage.steps} steps, shift {stage.shift}"

    text = (root / "docs" / "presets.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE)) == {
        name: f"{told(one.draft)} | {told(one.highres)} | {one.video.frames} / {one.video.fps}"
        for name, one in PRESETS.items()
    }


def test_exit_codes_are_those_of_the_program(root: Path) -> None:
    from pw_runtime.cli import exit_codes

    text = (root / "docs" / "exit_codes.md").read_text(encoding="utf-8")
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    ours = {value for value in vars(exit_codes).values() if isinstance(value, int)}
    assert told == ours | {128 + 1, 128 + 15}  # SIGHUP and SIGTERM


def test_formats_of_files_are_those_of_the_program(root: Path) -> None:
    from typing import get_args, get_type_hints

    from pw_bench import results
    from pw_engines import manifest as engine
    from pw_kernels import library
    from pw_runtime.checkpoint import manifest as bundle
    from pw_runtime.cli import json_output
    from pw_runtime.job import frame_log, receipt, step_file
    from pw_runtime.job.provenance import Provenance
    from pw_runtime.server import store
    from pw_runtime.system import tile_store

    text = (root / "docs" / "files.md").read_text(encoding="utf-8")
    told = {
        name: int(number)
        for name, number in re.findall(r"^\| (.+?) \| (\d+) \|", text, re.MULTILINE)
    }
    assert told == {
        "`bundle.json` and its folders": bundle.FORMAT,
        "`<id>.json`": receipt.FORMAT,
        "`<id>.latents.safetensors`": max(get_args(get_type_hints(Provenance)["format"])),
        "`<id>.steps.safetensors`": step_file.FORMAT,
        "`<id>.frames.safetensors`": frame_log.FORMAT,
        "`<id>.tiles`, `<id>.tiles.state`": tile_store.FORMAT,
        "`manifest.json` of an engine": engine.FORMAT,
        "the kernels' library": library.FORMAT,
        "results of `pw bench`": results.FORMAT,
        "`queue.sqlite`": store.FORMAT,
        "`--json` documents": json_output.FORMAT,
    }
