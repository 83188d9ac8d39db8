# SPDX-License-Identifier: Apache-2.0
"""`pw bench serve`: every part, at sizes that prove nothing but that it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pw_bench.results import read_result
from pw_runtime.cli.bench import bench
from tests.e2e.pw import write_preset


@pytest.mark.slow
def test_all_parts_are_measured(bundle_dir: Path, tmp_path: Path) -> None:
    preset, out = write_preset(tmp_path / "small.toml"), tmp_path / "r.json"
    sizes = ["--clients", "2", "--rounds", "1", "--streams", "3", "--queued", "4", "--soak", "2"]
    arguments = ["--model", str(bundle_dir), "--preset", str(preset), *sizes, "--out", str(out)]
    ran = CliRunner().invoke(bench, ["serve", *arguments], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    result = read_result(out)
    assert result.kind == "serve"
    figures = {figure.name: figure for figure in result.figures}
    assert len(figures["4 queued/time of a submission"].samples) == 4
    assert len(figures["soak/time of a job"].samples) == 2
    assert figures["soak/process memory, worker"].median > 0
    assert len(figures["status, 2 clients without a pause/time of an answer"].samples) > 2
    server = figures["3 streams/process memory after"].median
    assert server < 200 * 2**20, "the process that answers has no torch"
    assert result.ratios[0].time is not None
