# SPDX-License-Identifier: Apache-2.0
"""`pw bench approximations` and the sensitivity of quantized parts: what their figures are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pw_bench.quality.approximations import EXACT, REFERENCE, measure_approximations, parse_variant
from pw_bench.quality.linear_error import measure_linear_error
from pw_bench.quality.render import examples
from pw_bench.quality.run import measure_quality
from pw_bench.quality.sensitivity import Undivided, quantize_layers, sensitivity
from pw_bench.report import markdown
from pw_bench.report.findings import headline
from pw_bench.results import Result, read_result, write_result
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.errors import BadRequest
from pw_runtime.models.quantized_linear import QUANTIZED, QuantizedLinear
from pw_runtime.presets import find_preset
from tests.closeness import relative_l2
from tests.e2e.pw import write_preset


def test_a_variant_is_the_exact_path_with_what_it_names() -> None:
    options = parse_variant("step_cache=0.05, guidance_reuse=2,linear=int8")
    assert (options.step_cache, options.guidance_reuse, options.linear) == (0.05, 2, "int8")
    assert options.codec == REFERENCE.codec == "ffv1"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("step_cash=0.05", "step_cash"),
        ("step_cache=much", "step_cache"),
        ("linear=int5", "linear"),
        ("", "no variant"),
        ("conv=onednn", "approximates nothing"),
    ],
)
def test_what_is_no_variant_is_one_error(text: str, what: str) -> None:
    with pytest.raises(BadRequest, match=what) as raised:
        parse_variant(text)
    assert what in str(raised.value)


@pytest.mark.parametrize("highres", [True, False])
def test_clips_that_cannot_be_judged_are_refused_before_any_is_made(
    bundle_dir: Path, highres: bool
) -> None:
    """Seen: an AssertionError after all clips, and captions that were fewer than the clips."""
    preset, clips = ("nano", 2) if highres else ("draft", 1)
    message = "--captions 2, or" if highres else "a preset without one"
    with pytest.raises(BadRequest, match=message):
        measure_approximations(
            bundle_dir, preset, ("step_cache=0.5",), clips=clips, captions=1, say=pytest.fail
        )


@pytest.mark.parametrize("measure", [measure_quality, measure_linear_error])
def test_a_preset_without_a_high_res_stage_is_refused_at_the_start(
    bundle_dir: Path, measure: Callable[..., Result]
) -> None:
    more: dict[str, Any] = {"tokens": 2, "say": pytest.fail}
    if measure is measure_quality:
        more = {"captions": 1, "sheet": None}
    with pytest.raises(BadRequest, match="a preset without one"):
        measure(bundle_dir, "draft", clips=1, **more)


@pytest.mark.slow
def test_variants_are_compared_with_the_exact_clip_and_labelled(
    bundle_dir: Path, tmp_path: Path
) -> None:
    preset = write_preset(tmp_path / "many.toml", draft_steps=8)
    variants = ("step_cache=0.9", "step_cache=0.000001")
    result = measure_approximations(
        bundle_dir, str(preset), variants, clips=2, captions=2, say=lambda line: None
    )
    write_result(result, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result
    labels = [(same.side, same.label) for same in result.equivalence]
    assert labels == 2 * [(variants[0], "approximate"), (variants[1], "bit-exact")]
    assert [figure.name for figure in result.figures] == [
        f"{name}/CPU time" for name in (EXACT, *variants)
    ]
    assert "steps, " in result.sides[variants[0]]
    assert result.identity.operations["attention"] == "reference"
    assert result.identity.engines[f"{EXACT}/vae"] == "eager"
    assert result.sides[variants[1]].endswith("0 to 0 steps, 0.0 on average")
    assert result.quality is not None
    assert [variant.name for variant in result.quality.variants][1:] == [EXACT, *variants]
    # Two samples make no headline; where there is a ratio, it says how the outputs differ.
    assert headline(result).statements == ()
    page = markdown([result])
    assert "step\\_cache=0.9" in page
    assert "approximate" in page


def test_a_whole_network_behind_the_interface_of_the_stages_is_the_network(
    bundle_dir: Path,
) -> None:
    bundle = open_bundle(bundle_dir)
    with torch.inference_mode():
        net = load_dit(bundle, "draft", "fp32", torch.device("cpu"))
        config = net.config
        latent = torch.randn(config.in_dim, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        undivided = Undivided(net)
        text = undivided.text_keys_values(torch.ones(3, config.text_dim))
        rows, layout = undivided.modulation(torch.tensor([500.0])), undivided.layout(latent)
        (velocity,) = undivided.velocities(latent, [text], rows, layout)
        assert torch.equal(velocity, net(latent, text, rows, layout))

        quantized = deepcopy(net)
        quantize_layers(quantized.blocks[1], ("ffn.0",), "int8")
        assert isinstance(quantized.blocks[1].get_submodule("ffn.0"), QuantizedLinear)
        assert not isinstance(quantized.blocks[1].get_submodule("ffn.2"), QuantizedLinear)
        got = quantized(latent, text, rows, layout)
        assert 0 < relative_l2(got, velocity) < 0.05


def test_every_part_of_both_networks_has_its_error_in_the_last_latent(
    bundle_dir: Path, tmp_path: Path
) -> None:
    """Seen: the stages asked for more than the undivided network had, and no test ran them."""
    preset = find_preset(str(write_preset(tmp_path / "small.toml")))
    bundle, networks = open_bundle(bundle_dir), ("draft", "highres")
    with torch.inference_mode():
        found = list(sensitivity(bundle, preset, examples(1), ("int8",), lambda line: None))
    expected = [
        f"int8, {stage}, {part}"
        for stage in networks
        for part in (
            "block 0",
            "block 1",
            "block 2",
            *(f"{name} of all blocks" for name in QUANTIZED),
        )
    ]
    assert [difference.side for difference in found] == expected
    assert all(x.relative_l2 is not None and 0 < x.relative_l2 < 0.5 for x in found)
