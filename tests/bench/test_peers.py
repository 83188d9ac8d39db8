# SPDX-License-Identifier: Apache-2.0
"""Programs that compare with others: their sides agree, and their results can be read again."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter

from pw_bench.peers import dit, subprocess_ab, vae

pytest.importorskip("diffusers")

DIT = ("--dim", "384", "--layers", "2", "--width", "128", "--height", "64", "--frames", "9")
VAE = ("--width", "64", "--height", "64", "--frames", "5", "--strips", "2")


@pytest.fixture
def result_of(tmp_path, monkeypatch):
    """Runs a program, its samples in this process; gives the content of its result file."""

    def run(program, *args: str):
        def child(module: str, args: list[str]) -> subprocess_ab.Sample:
            assert module == program.__name__
            return subprocess_ab.parsed(invoke(args))

        def invoke(args: list[str]) -> str:
            return CliRunner().invoke(program.main, args, catch_exceptions=False).output

        monkeypatch.setattr(subprocess_ab, "run_child", child)
        file = tmp_path / "result.json"
        invoke(["--out", str(file), "--rounds", "1", *args])
        return TypeAdapter(program.Result).validate_json(file.read_bytes())

    return run


def test_transformer_in_parts_equals_diffusers_after_a_stage(result_of) -> None:
    result = result_of(dit, *DIT, "--part", "5")
    assert result.tokens == 3 * 2 * 4  # in five parts
    names = [side.name for side in result.sides]
    assert names == [dit.THEIRS, dit.PER_TOKEN, dit.OURS]
    # diffusers computes its sinusoids in fp32, and guidance multiplies what comes of it.
    assert max(side.relative_l2 for side in result.sides) <= 1e-5
    assert all(len(side.samples) == 1 for side in result.sides)
    theirs, _, ours = result.sides
    assert theirs.ledger_bytes > ours.ledger_bytes > 0


def test_decoder_in_bands_equals_diffusers_to_one_level(result_of) -> None:
    result = result_of(vae, *VAE)
    names = [side.name for side in result.sides]
    assert names == [vae.THEIRS, vae.TILED, vae.OURS]
    theirs, _, ours = result.sides
    assert ours.largest_difference <= 1
    assert ours.share_that_differs <= 1e-3
    assert theirs.ledger_bytes > ours.ledger_bytes > 0
