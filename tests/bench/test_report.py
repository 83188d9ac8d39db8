# SPDX-License-Identifier: Apache-2.0
"""A report shows everything that was measured, claims no more, and needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pw_bench.report import json_lines, markdown, write_html
from pw_bench.report.findings import headline
from pw_bench.report.spans import rows
from pw_bench.report.waterfall import POINTS, drawing
from pw_bench.result_sections import Attributes, Likeness, OutputDifference, Quality, Ratio, Variant
from pw_bench.results import Figure, read_result, write_result
from pw_runtime.cli.bench import report
from pw_runtime.errors import BadRequest
from pw_runtime.presets import PRESETS
from tests.bench.html_page import page
from tests.bench.small_results import (
    CEILING,
    CLIP,
    IDENTITY,
    KERNELS,
    OURS,
    RESULT,
    THEIRS,
    figure,
    result,
    span,
)


def test_every_sample_is_a_dot_rejected_ones_too(tmp_path: Path) -> None:
    rejected = figure("ours/warm", 5.0, 5.125, 4.9375, rejected=(7.75, 900.0))
    html = page(tmp_path, replace(RESULT, figures=(rejected, THEIRS)))
    assert html.of_class("sample") == ["5 s", "5.125 s", "4.9375 s", "10 s", "10.1 s", "10.2 s"]
    assert html.of_class("rejected") == ["7.75 s", "900 s"]


def test_headline_has_the_medians_and_the_ratio_with_its_difference() -> None:
    head = headline(RESULT)
    assert head.statements == (
        "ours: 5.01 s warm",
        "ours against theirs: 2.02 x as fast warm (clips: rounding)",
    )
    assert head.reasons == ()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (replace(OURS, fell_back=("attention: reference",)), "fell back: attention: reference"),
        (replace(OURS, samples=(5.0, 6.0, 7.0)), "unstable: p10 to p90 is 26.7 % of the median"),
        (replace(OURS, samples=(5.0, 5.0)), "unstable: 2 samples"),
    ],
)
def test_no_headline_of_what_fell_back_or_is_unstable(
    bad: Figure, why: str, tmp_path: Path
) -> None:
    weak = replace(RESULT, figures=(bad, THEIRS))
    assert headline(weak).statements == ()
    assert f"no headline: ours/warm {why}" in headline(weak).line
    html = page(tmp_path, weak)
    assert not html.of_class("headline")
    assert f"ours/warm {why}" in html.texts("li")
    assert why in html.texts("small")
    assert why in markdown([weak])


def test_no_ratio_where_a_figure_of_it_fell_back_or_is_missing() -> None:
    head = headline(replace(RESULT, figures=(OURS, replace(THEIRS, fell_back=("so",)))))
    assert head.statements == ("ours: 5.01 s warm",)
    assert head.reasons == ("no warm ratio of ours against theirs: theirs/warm fell back: so",)
    head = headline(replace(RESULT, figures=(OURS,)))
    assert head.statements == ("ours: 5.01 s warm",)
    assert head.reasons[0].endswith("there is no figure of theirs, warm")


def test_ratio_names_how_both_clips_differ_from_a_third() -> None:
    both = (replace(OURS, name="ours-engines/warm"), THEIRS)
    ratio = Ratio(side="ours-engines", against="theirs", warm=2.0)
    statements = headline(replace(RESULT, figures=both, ratios=(ratio,))).statements
    assert statements[1].endswith(
        "(clips: ours-engines not compared, theirs rounding against ours)"
    )


def test_no_shares_of_a_ceiling_that_is_unstable(tmp_path: Path) -> None:
    assert "75.0 %" in headline(KERNELS).line
    shaky = replace(CEILING, figure=figure("any", 1.0, 2.0))
    unstable = replace(KERNELS, ceilings=replace(KERNELS.ceilings, copy=shaky))
    assert "75.0 %" not in headline(unstable).line
    assert headline(unstable).reasons == ("no shares of ceilings: copy unstable",)
    assert "ceiling copy: 2 samples" in " ".join(page(tmp_path, unstable).texts("p"))


def test_a_refused_ratio_has_its_reason(tmp_path: Path) -> None:
    refused = Ratio(side="ours", against="theirs", refused="clips differ")
    html = page(tmp_path, replace(RESULT, ratios=(refused,)))
    assert "no ratio of ours against theirs: clips differ" in html.texts("li")
    assert html.of_class("remark") == ["refused: clips differ"]


def test_dirty_files_are_named_in_the_headline(tmp_path: Path) -> None:
    dirty = replace(RESULT, identity=replace(IDENTITY, dirty=True))
    assert "measured with uncommitted changes" in headline(dirty).statements
    assert "Dirty:" in page(tmp_path, dirty).texts("b")
    assert "files differed from commit abc1234" in markdown([dirty])
    assert json.loads(json_lines([dirty]).splitlines()[0])["dirty"] is True


def test_nothing_of_a_result_can_break_out_and_its_json_reads_back(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- <img src=x> ]]> \u2028 & ' \" {{ 7 * 7 }}"
    hostile = replace(
        RESULT,
        command=evil, scope={"words": evil, evil: evil}, sides={"ours": evil},
        figures=(OURS, THEIRS, figure(f"{evil}/warm", 1.0)),
        clips=(replace(CLIP, side=evil, spans=(span(evil, 0, 9.5),)),),
    )  # fmt: skip
    html = page(tmp_path, hostile, KERNELS)
    scripts = [attributes for tag, attributes, _ in html.elements if tag == "script"]
    assert [script["type"] for script in scripts] == ["application/json"] * 2
    assert not [tag for tag, _, _ in html.elements if tag == "img"]
    assert evil in html.texts("dd")
    for expected, text in zip((hostile, KERNELS), html.texts("script"), strict=True):
        (tmp_path / "back.json").write_text(text, encoding="utf-8")
        assert read_result(tmp_path / "back.json") == expected


def test_page_loads_nothing(tmp_path: Path) -> None:
    html = page(tmp_path, RESULT, KERNELS)
    names = {name for _, attributes, _ in html.elements for name in attributes}
    assert not names & {"src", "srcset", "data", "action", "xlink:href", "style", "onload"}
    links = [attributes["href"] for _, attributes, _ in html.elements if "href" in attributes]
    assert links == ["#result-1", "#result-2"]
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _, _ in html.elements}
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "report.html").read_text())


def test_every_field_of_the_machine_is_on_the_page(tmp_path: Path) -> None:
    text = " ".join(page(tmp_path, RESULT).texts("dd"))
    for words in (
        *("3.11.9", "Linux 6.1", "Processor", "24.0 GiB", "torch 2.13.0", "x 1 BROKEN: so"),
        *("Accelerator (80.0 GiB, sm 9.0)", "570.1", "abc1234", "7", "0.25"),
        *("nano: digest-of-weights", "draft: kind-of-engine", "attention: who-attends"),
        *("sm clock 1755 MHz", "power 88.5 W", "power limit unknown", "temperature 41 °C"),
    ):
        assert words in text


def test_steps_share_a_row_and_short_spans_are_listed_instead() -> None:
    drawn = drawing(CLIP, "ours, warm")
    assert [lane.name for lane in drawn.lanes] == ["draft", "step × 7", "write", "unattributed"]
    assert [lane.level for lane in drawn.lanes] == [0, 1, 0, 0]
    assert drawn.lanes[-1].value == "0.50 s"
    assert drawn.lanes[-1].detail == "5.0 %"
    assert [(lane.name, lane.level, lane.note) for lane in drawn.others] == [
        ("encode", 0, "pw-overlap")
    ]
    assert drawn.short is not None
    assert [row[0] for row in drawn.short.rows] == ["plan"]
    assert drawn.seconds == (("draft", ", ".join(["900"] * 7) + " ms"),)


def test_time_that_does_not_add_up_is_reported() -> None:
    whole = drawing(CLIP, "").reconciled
    assert "do not add up" not in whole
    assert whole.endswith("of median time; unattributed in all 3: 1.0 % to 6.2 %.")
    assert "do not add up, by 20.0 %" in drawing(replace(CLIP, unattributed=2.5), "").reconciled


def test_a_span_lies_in_the_one_that_was_open() -> None:
    inner = (span("write", 0, 9), span("decode", 0, 2, 1), span("pack", 1, 2, 2))
    again = (span("decode", 3, 5, 1), span("pack", 4, 5, 2), span("pack", 9, 10))
    counts = {row.path: len(row.spans) for row in rows((*inner, *again))}
    whole = {("write",): 1, ("write", "decode"): 2, ("write", "decode", "pack"): 2, ("pack",): 1}
    assert counts == whole


def test_a_long_memory_curve_keeps_its_peak_and_the_plan_its_line() -> None:
    (lane,) = drawing(CLIP, "").memory
    points = re.findall(r'points="([^"]*)"', lane.plot)[0].split()
    assert len(points) <= POINTS
    assert min(float(point.split(",")[1]) for point in points) == pytest.approx(
        1000 - 1000 / 1.08, abs=1
    )
    assert "plan: draft 1.50 GiB" in lane.plot
    assert "draft 1.50 GiB" in lane.note


def test_kernels_have_time_error_share_and_reasons(tmp_path: Path) -> None:
    html = page(tmp_path, KERNELS)
    cells = html.texts("td")
    assert {"1.00 ms", "2.00 TB/s", "75.0 %", "3.0e-07", "no"} <= set(cells)
    assert html.of_class("remark") == ["refused: is for another GPU"]
    assert "norm, 2k, triton: a second run gave other numbers" in " ".join(html.texts("p"))
    assert html.of_class("point") == ["norm/2k/triton: 1.00 TFLOP/s at 0.5 FLOP/B"]
    assert len(html.of_class("roof")) == 4


def test_stages_have_what_they_achieved_and_its_share(tmp_path: Path) -> None:
    step = figure("draft step", 2.0, 2.0, 2.0, flops=3e12, of_ceiling=0.5)
    stages = replace(KERNELS, kind="stages", kernels=(), figures=(step,))
    assert "1.50 TFLOP/s, 50.0 % of ceiling" in page(tmp_path, stages).texts("small")


def test_what_was_skipped_and_how_to_repeat_is_on_the_page(tmp_path: Path) -> None:
    html = page(tmp_path, RESULT)
    assert "energy" in html.texts("dt")
    assert "nobody counts it" in html.texts("dd")
    assert " ".join(html.texts("span")[-5:]) == "pw bench e2e --out again.json"


def test_result_without_figures_has_no_headline(tmp_path: Path) -> None:
    empty = replace(RESULT, figures=(), clips=(), equivalence=(), ratios=(), sides={}, scope={})
    assert "the result has no figures" in page(tmp_path, empty).texts("li")
    assert "no headline" in markdown([empty])
    assert json_lines([empty]) == ""


def test_markdown_has_the_medians_and_stays_a_table() -> None:
    text = markdown([replace(RESULT, figures=(replace(OURS, name="a|b\n/warm"), THEIRS))])
    assert "| theirs/warm | 10.1 s | 10.0 s | 10.2 s | 3 |" in text
    assert "| a\\|b /warm | 5.01 s |" in text
    assert "| ours | theirs | none | 2.02 x | none | rounding |" in text


def test_a_json_line_is_a_figure_with_where_it_is_from() -> None:
    first, second = [json.loads(line) for line in json_lines([RESULT]).splitlines()]
    assert second["name"] == "theirs/warm"
    assert first["samples"] == [5.0, 5.01, 5.02]
    assert (first["median"], first["unit"]) == (5.01, "s")
    assert (first["p10"], first["p90"]) == pytest.approx((5.002, 5.018))
    assert (first["kind"], first["commit"], first["scope"]["device"]) == ("e2e", "abc1234", "cpu")
    assert first["machine"] == "Accelerator, driver 570.1, Processor"


def test_figures_without_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="ours/warm has no samples"):
        write_html([replace(RESULT, figures=(replace(OURS, samples=()),))], tmp_path / "a.html")
    assert not [*tmp_path.iterdir()]


def test_command_writes_all_three(tmp_path: Path) -> None:
    write_result(RESULT, tmp_path / "a.json")
    write_result(KERNELS, tmp_path / "b.json")
    names = [str(tmp_path / name) for name in ("a.json", "b.json", "r.html", "r.md", "r.jsonl")]
    ran = CliRunner().invoke(
        report,
        [*names[:2], "--out", names[2], "--markdown", names[3], "--json-lines", names[4]],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0, ran.output
    assert "End to end" in Path(names[2]).read_text(encoding="utf-8")
    assert Path(names[3]).read_text(encoding="utf-8").count("### ") == 2
    assert len(Path(names[4]).read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(("file", "out"), [("a.json", "a.json"), ("b.json", "r.html")])
def test_command_overwrites_no_result_and_writes_nothing_of_a_bad_one(
    file: str, out: str, tmp_path: Path
) -> None:
    write_result(RESULT, tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"format": 1}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ran = CliRunner().invoke(report, [str(tmp_path / file), "--out", str(tmp_path / out)])
    assert isinstance(ran.exception, BadRequest)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_peers_have_ratios_and_differences(tmp_path: Path) -> None:
    difference = OutputDifference(side="ours", against="theirs", max_abs=1, unit="levels of 255")
    peers = result(
        *(figure(f"{name}/time", *[seconds] * 3) for name, seconds in (("ours", 1), ("theirs", 2))),
        kind="vae-peers",
        ceilings=None,
        ratios=(Ratio(side="ours", against="theirs", time=2.0),),
        differences=(difference,),
    )
    assert headline(peers).statements[1] == (
        "ours against theirs: 2.00 x as fast (outputs: differ by at most 1 (levels of 255))"
    )
    html = page(tmp_path, peers)
    assert {"Differences", "Ratios"} <= set(html.texts("h3"))
    assert "Ceilings" not in html.texts("h3")
    assert "| ours | theirs | 2.00 x | none | none | none |" in markdown([peers])


def test_quality_has_shares_and_likeness(tmp_path: Path) -> None:
    shares = {"colour": 1.0, "shape": 0.25}
    variants = tuple(
        Variant(name=name, adherence=shares, sharpness=sharpness, seen=())
        for name, sharpness in (("true renderings", 2.0), ("4 steps", 1.0))
    )
    likeness = Likeness(
        name="64x32", psnr=(30.0,), ssim=(0.9,), mean_psnr=30.0, mean_ssim=0.9, sharpness=2e-3
    )
    quality = Quality(
        preset=PRESETS["nano"],
        captions=("a red ball",),
        expected=(Attributes("red", "circle", None),),
        variants=variants,
        reconstruction=(likeness,),
        from_true_drafts=(),
    )
    measured = result(kind="quality", ceilings=None, quality=quality)
    assert {"4 steps", "25%", "0.50", "30.0 dB"} <= set(page(tmp_path, measured).texts("td"))
    text = markdown([measured])
    assert "| 4 steps | 100% | 25% | 0.50 |" in text
    assert "| through encoder and decoder, 64x32 | 30.0 dB | 0.900 | 2.00e-03 |" in text
