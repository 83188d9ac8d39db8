# SPDX-License-Identifier: Apache-2.0
"""What a plan decides, refuses and says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pw_export.wan22_configs import NETWORKS
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadRequest
from pw_runtime.planning.candidates import Candidate, candidates, decode_candidates
from pw_runtime.planning.decode_choices import decode_choices, decode_traffic
from pw_runtime.planning.oom_fallback import OomFallback, free_memory
from pw_runtime.planning.planner import GIB, fits, make_plan
from pw_runtime.planning.report import division_report, plan_report
from pw_runtime.planning.stage_times import seconds_by_stage
from pw_runtime.planning.time_estimate import KNOWN
from pw_runtime.planning.workload import Workload, request_workload, workload
from pw_runtime.presets import PRESETS, check_preset
from pw_runtime.sizes import sized
from pw_runtime.stages.codecs import RECIPES, pixel_format_for
from pw_runtime.types import (
    Blocks,
    Budget,
    Codec,
    Compat,
    DecodePlan,
    MemoryItem,
    Precision,
    Prompt,
    Request,
    RunOptions,
    RunPlan,
    StageMemory,
    StageName,
    TilingConfig,
)


def work_for(
    preset: str = "4k", *, vae_precision: Precision = "fp32", decode: TilingConfig | None = None
) -> Workload:
    found = PRESETS[preset]
    if decode is not None:
        found = replace(found, decode=decode)
    options = RunOptions(precision="bf16", vae_precision=vae_precision)
    work = workload(NETWORKS, found, options)
    return replace(work, process=GIB)


def plan_for(preset: str, gpu: float, host: float = 64) -> RunPlan:
    budget = Budget(host=int(host * GIB), device=int(gpu * GIB))
    return make_plan(candidates(work_for(preset), gpu=True), budget)


def test_frames_that_stay_in_memory_are_planned_in_place_of_an_encoder() -> None:
    request = Request(prompts=(Prompt("a fox"),) * 10, preset=PRESETS["2k"], out=Path())
    for in_memory in (False, True):
        work = request_workload(NETWORKS, replace(request, in_memory=in_memory))
        _, (items,) = next(iter(decode_choices(work, gpu=True)))
        held = {item.name: item.bytes for item in items if item.kind == "process"}
        assert ("h264 encoder (estimate)" in held) is not in_memory
        assert held.get("frames", 0) == in_memory * 10 * 121 * 2560 * 1440 * 3


@pytest.mark.parametrize(
    ("preset", "gpu", "weights"),
    [
        *[("2k", 16, "resident"), ("4k", 24, "resident"), ("4k", 16, "streamed")],
        *[("2k-portrait", 16, "resident"), ("2k-square", 16, "resident")],
        *[("4k-portrait", 24, "resident"), ("4k-square", 24, "resident")],
        *[("4k-portrait", 16, "streamed"), ("4k-square", 16, "streamed")],
    ],
)
def test_the_promised_budgets_are_met(preset: str, gpu: int, weights: str) -> None:
    plan = plan_for(preset, gpu)
    assert plan.transformers["highres"].weights == weights
    assert all(fits(memory, plan.budget) for memory in plan.stages)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("width", [32, 96, 1440])
def test_every_tiling_of_a_portrait_can_be_stored_with_its_latents(width, gpu) -> None:
    """Seen: bands up to the number of rows, where a latents file may name as many as columns."""
    preset = PRESETS["2k"]
    assert preset.highres is not None
    tall = replace(preset.highres, width=width, height=2560)
    preset = replace(preset, highres=tall, decode=TilingConfig(overlap=0))
    work = workload(NETWORKS, preset, RunOptions(precision="bf16"))
    plans = [plan for plan, _ in decode_choices(work, gpu=gpu)]
    assert {plan.tiling.order for plan in plans} == {"frames", "tiles"}
    for plan in plans:
        check_preset(replace(preset, decode=plan.tiling), "latents")


def test_a_large_gpu_takes_the_fastest_way_of_every_stage() -> None:
    plan = plan_for("4k", 141, 128)
    assert plan.text == "device"
    assert {one.weights for one in plan.transformers.values()} == {"resident"}
    assert all(one.share_attention for one in plan.transformers.values())
    assert plan.decode == DecodePlan(tiling=replace(PRESETS["4k"].decode, order="frames"))
    assert all(" would take " not in decision for decision in plan.decisions)


def test_less_memory_goes_down_one_ladder_after_the_other() -> None:
    """Sharing is given up before weights leave the GPU: it saves less than they take."""
    plans = [plan_for("2k", gpu).transformers["highres"] for gpu in (17, 16, 12)]
    assert [(plan.weights, plan.share_attention) for plan in plans] == [
        ("resident", True),
        ("resident", False),
        ("streamed", True),
    ]


def test_encoders_that_do_not_fit_on_the_gpu_are_loaded_on_the_cpu() -> None:
    work = work_for("2k")
    stages = candidates(replace(work, encoded=tuple(work.stages.values())), gpu=True)
    budget = Budget(host=64 * GIB, device=24 * GIB)
    fallback = OomFallback(stages, budget, torch.device("cpu"))
    for stage in ("text", "encode"):
        assert fallback.choice(stage) == "device"
        index = fallback.next_smaller(stage, loading=True)
        assert index is not None
        fallback.fall_back(stage, index, "while loading")
        assert fallback.choice(stage) == "host"


@pytest.mark.parametrize("loading", [True, False])
def test_a_way_that_takes_less_of_all_ranks_is_smaller_though_the_first_one_takes_more(
    loading: bool,
) -> None:
    """The ranks share the host."""

    def way(*weights: int) -> Candidate[DecodePlan]:
        first, *others = (
            (MemoryItem(name="weights", kind="weights", bytes=size, place="host"),)
            for size in weights
        )
        memory = StageMemory(stage="decode", items=first, others=tuple(others))
        return Candidate(choice=DecodePlan(tiling=TilingConfig()), name="a way", memory=memory)

    stages = {"decode": (way(4, 9), way(5, 9), way(6, 6))}
    fallback = OomFallback(stages, Budget(host=20), torch.device("cpu"))
    assert fallback.next_smaller("decode", loading=loading) == 2


def test_memory_that_is_freed_for_another_attempt_includes_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("device"))
    monkeypatch.setattr(
        torch._C, "_host_emptyCache", lambda: given_back.append("pinned"), raising=False
    )
    free_memory(torch.device("cpu"))
    assert given_back == []
    free_memory(torch.device("cuda"))
    assert given_back == ["device", "pinned"]


def test_files_that_hold_the_precision_are_not_copied_to_host_memory() -> None:
    work = replace(work_for(), stored={"draft": "bf16", "highres": "bf16"})
    plan = make_plan(candidates(work, gpu=True), Budget(host=64 * GIB, device=16 * GIB))
    assert plan.transformers["highres"].weights == "mapped"
    assert "streamed from the bundle's files" in plan.decisions[2]


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_the_precision_of_files_is_read_from_a_bundle(
    bundle_dir: Path, dtype: str, precision: Precision
) -> None:
    networks = open_bundle(bundle_dir).networks
    assert networks.draft.dtype == "float32"
    networks = replace(networks, draft=replace(networks.draft, dtype=dtype))
    assert workload(networks, PRESETS["nano"], RunOptions()).stored["draft"] == precision


def test_weights_that_a_lora_is_merged_into_are_kept_in_host_memory_where_they_fit() -> None:
    """Mapped ones are merged whenever they are used, and the plan says so."""
    stored: dict[StageName, Precision | None] = {"draft": "bf16", "highres": "bf16"}
    work = replace(work_for(), stored=stored, loras=frozenset({"highres"}))
    options = candidates(work, gpu=True)
    ways = {
        stage: list(dict.fromkeys(option.choice.weights for option in options[stage]))
        for stage in ("draft", "highres")
    }
    assert ways == {
        "draft": ["resident", "mapped"],
        "highres": ["resident", "streamed", "mapped"],
    }
    for stage, merges in (("draft", False), ("highres", True)):
        mapped = next(x for x in options[stage] if x.choice.weights == "mapped")
        said = "weights streamed from the bundle's files with the LoRA merged at every use"
        assert (said in mapped.name) == merges


def test_what_merging_a_lora_takes_is_in_the_plan() -> None:
    """The largest weight and what is added to it, in fp32; tests/convert counts a merge."""
    work = replace(work_for(), loras=frozenset({"draft"}))
    draft, highres = (candidates(work, gpu=True)[stage][0].memory for stage in ("draft", "highres"))
    (merging,) = (item for item in draft.items if item.name == "LoRA merged into a weight")
    assert (merging.place, merging.kind) == ("host", "activations")
    assert all(item.name != merging.name for item in highres.items)
    largest = 18432 * 3072  # time_projection
    assert merging.bytes == 2 * 4 * largest


def test_engines_of_one_size_keep_their_part_and_leave_the_decoder_itself_as_a_way() -> None:
    work = replace(work_for(), padded=True, decoder_engines=True)
    found = candidates(work, gpu=True)
    assert {way.choice.chunk for way in found["highres"]} == {8192}
    choices = [candidate.choice for candidate in found["decode"][:3]]
    frames, tiles = (replace(PRESETS["4k"].decode, order=order) for order in ("frames", "tiles"))
    assert choices == [
        DecodePlan(tiling=replace(frames, strips=8), engines=True),
        DecodePlan(
            tiling=replace(tiles, strips=8), engines=True, store_bytes=121 * 3840 * 2144 * 3 // 2
        ),
        DecodePlan(tiling=frames),
    ]


def test_the_tiling_of_a_narrow_draft_can_be_stored_with_its_latents() -> None:
    preset = sized(PRESETS["4k"], (32, 800))
    work = workload(NETWORKS, preset, RunOptions(draft_only=True))
    check_preset(replace(preset, decode=work.tiling), "latents")


@pytest.mark.parametrize(
    ("height", "gpu", "strips"),
    [(64, False, 1), (256, False, 2), (1440, False, 4), (1440, True, 1)],
)
def test_a_cpu_decodes_high_pictures_in_bands(height: int, gpu: bool, strips: int) -> None:
    work = work_for("nano")
    last = replace(work.stages["highres"], height=height)
    work = replace(work, stages={**work.stages, "highres": last})
    assert decode_candidates(work, gpu=gpu)[0].choice.tiling.strips == strips


def test_blended_strips_are_never_recut() -> None:
    official = TilingConfig(tiling="official", strips=4)
    found = candidates(work_for(decode=official), gpu=True)
    tilings = [way.choice.tiling for way in found["decode"]]
    assert tilings == [replace(official, order=order) for order in ("frames", "tiles")]


@pytest.mark.parametrize(
    ("preset", "gpu", "host", "vae"),
    [
        ("2k", 16, 14, "fp32"),
        ("4k", 24, 24, "fp32"),
        ("4k", 24, 12, "bf16"),
    ],
)
def test_tile_by_tile_a_decode_fits_a_card_and_its_host(
    preset: str, gpu: int, host: int, vae: Precision
) -> None:
    """With its past on the host instead it took 40 GiB of host memory at 2K and 68 at 4K."""
    work = work_for(preset)
    work = replace(work, options=replace(work.options, vae_precision=vae))
    budget = Budget(host=host * GIB, device=gpu * GIB)
    chosen = next(one for one in decode_candidates(work, gpu=True) if fits(one.memory, budget))
    assert chosen.choice.tiling.order == "tiles"
    assert decode_traffic(work, chosen.choice) <= 300 * GIB


@pytest.mark.parametrize("codec", list(RECIPES))
@pytest.mark.parametrize("truncating", [False, True])
def test_the_tiles_on_the_disk_are_as_large_as_planned(codec: Codec, truncating: bool) -> None:
    work = work_for("nano")
    compat = Compat(truncating_uint8=truncating)
    options, preset = replace(work.options, codec=codec), replace(work.preset, compat=compat)
    work = replace(work, options=options, preset=preset)
    colours = {"rgb24": 3, "yuv420p": 1.5}[pixel_format_for(codec, compat)]
    stored = {
        one.choice.tiling.order: one.choice.store_bytes for one in decode_candidates(work, gpu=True)
    }
    assert stored == {"frames": 0, "tiles": 17 * 256 * 128 * colours}


def test_what_cannot_work_is_refused_with_a_budget_that_does() -> None:
    with pytest.raises(BadRequest) as refused:
        plan_for("4k", 8)
    text = str(refused.value)
    assert "this clip does not fit into memory (too large: highres, decode)" in text
    assert "8.0 GiB of GPU memory" in text
    wanted = text.splitlines()[2]
    gpu, host = (float(number) for number in re.findall(r"([\d.]+) GiB", wanted))
    plan_for("4k", gpu, host)  # and that one works
    with pytest.raises(BadRequest):
        plan_for("4k", gpu - 0.5, host)


@pytest.mark.parametrize(
    ("gpu", "host", "more"),
    [
        (16, 8, "host memory"),
        (8, 64, "GPU memory"),
        (12, 12, "memory"),
    ],
)
def test_the_budget_that_is_named_is_enough_and_a_little_less_is_not(
    gpu: float, host: float, more: str
) -> None:
    """Seen: 30.8 GiB of a GPU, where the 16 that it had were enough with more on the host."""
    with pytest.raises(BadRequest) as refused:
        plan_for("4k", gpu, host)
    wanted = str(refused.value).splitlines()[2]
    assert f", the least {more} that is enough" in wanted
    named = [float(number) for number in re.findall(r"([\d.]+) GiB", wanted)]
    plan_for("4k", *named)
    for place, given in enumerate((gpu, host)):
        if named[place] == given:
            continue
        less = [size - 0.2 * (index == place) for index, size in enumerate(named)]
        with pytest.raises(BadRequest):
            plan_for("4k", *less)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_only_options_that_were_not_given_are_advised(kind: Precision) -> None:
    stages = candidates(work_for("4k", vae_precision=kind), gpu=True)
    with pytest.raises(BadRequest, match=r"too large: .*decode") as refused:
        make_plan(stages, Budget(host=4 * GIB, device=4 * GIB))
    assert ("--vae-precision bf16" in str(refused.value)) is (kind == "fp32")


def test_half_the_precision_of_the_decoder_takes_half_of_its_memory() -> None:
    sizes = [
        candidates(work_for(vae_precision=kind), gpu=True)["decode"][0].memory.peak("device")
        for kind in ("fp32", "bf16")
    ]
    assert sizes[1] < 0.53 * sizes[0]


def test_the_account_adds_up_and_names_everything() -> None:
    work, plan = work_for(), plan_for("4k", 24)
    text = plan_report(work, plan, None, verbose=True)
    highres = plan.stages[2]
    assert sum(item.bytes for item in highres.items) == sum(
        highres.peak(place) for place in ("device", "host")
    )
    for stage in plan.stages:
        assert all(item.name in text for item in stage.items)
    assert "a clip" not in text.splitlines()[3]  # no rates, no times


def test_arithmetic_is_that_of_the_specification() -> None:
    """44.66 and 200.9 PFLOP without a shared attention (kernel accounting of the model)."""
    rates = replace(KNOWN["H200"], matmul=1e15, attention=1e15, conv=1e15, copy=1e15)
    for preset, wanted in (("2k", 44.66), ("4k", 200.9)):
        work, plan = work_for(preset), plan_for(preset, 141, 128)
        alone = {
            name: replace(one, share_attention=False) for name, one in plan.transformers.items()
        }
        seconds = seconds_by_stage(work, replace(plan, transformers=alone), rates)
        assert seconds["highres"] == pytest.approx(wanted, rel=1e-3)
        assert seconds["draft"] == pytest.approx(3.52, rel=1e-2)


def test_what_waits_between_the_stages_is_counted_for_every_prompt() -> None:
    """Seen: the texts of all prompts stood on the device, and in no plan."""
    one, many = (
        candidates(replace(work_for("2k"), prompts=count), gpu=True)["highres"][0].memory
        for count in (1, 101)
    )
    text, draft = 2 * 512 * 4096, 2 * 4 * 48 * 31 * 16 * 28
    assert many.peak("host") - one.peak("host") == 100 * (text + draft)
    assert many.peak("device") == one.peak("device")


def test_scratch_memory_of_engines_is_held_by_every_stage() -> None:
    """They are opened before the first stage, and share a buffer."""
    work = replace(work_for("2k"), scratch={"draft": GIB, "highres": 8 * GIB})
    without, held = (candidates(w, gpu=True) for w in (work_for("2k"), work))
    for stage in ("text", "draft", "highres", "decode"):
        (item,) = [x for x in held[stage][0].memory.items if x.kind == "scratch"]
        assert item.bytes == 8 * GIB
        assert not [x for x in without[stage][0].memory.items if x.kind == "scratch"]


def test_whole_blocks_hold_two_residual_streams_and_share_nothing() -> None:
    options = replace(work_for("2k").options, blocks="whole")
    work = replace(work_for("2k"), options=options, scratch={"highres": 8 * GIB})
    ways = candidates(work, gpu=True)["highres"]
    assert [way.choice.weights for way in ways] == ["resident", "streamed", "mapped"]
    assert not any(way.choice.share_attention for way in ways)
    names = {item.name: item.bytes for item in ways[0].memory.items}
    assert names["result of a block"] == names["residual stream"] == 4 * 111_600 * 3072
    assert "queries, keys, values" not in names
    assert ways[0].name == "weights resident, each block in one call"


def test_engines_that_need_more_than_there_is_are_named_with_the_number_and_a_way_out() -> None:
    work = replace(work_for("2k"), scratch={"highres": 21 * GIB})
    with pytest.raises(BadRequest, match=r"keep 21\.0 GiB of scratch memory.*--blocks segments"):
        make_plan(candidates(work, gpu=True), Budget(host=64 * GIB, device=16 * GIB))


def test_every_division_of_a_block_is_reported_with_what_it_takes() -> None:
    works: dict[Blocks, Workload | str] = {
        blocks: replace(
            work_for("2k"),
            options=replace(work_for("2k").options, blocks=blocks),
            scratch={"highres": size},
        )
        for blocks, size in (("segments", GIB // 2), ("whole", 21 * GIB))
    }
    works["attention"] = "highres network, attention: not built yet"
    budget = Budget(host=64 * GIB, device=20 * GIB)
    lines = list(division_report(works, budget, "segments"))
    assert re.fullmatch(
        r"blocks as segments: 16\.\d GiB of GPU memory, 512 MiB of it scratch: fits; "
        "chosen, the default, as no GPU has compared them",
        lines[0],
    )
    assert re.fullmatch(r"blocks as whole: .* 21\.0 GiB of it scratch: does not fit", lines[1])
    assert lines[2].endswith("attention: not built (highres network, attention: not built yet)")


def test_scratch_memory_of_engines_is_in_the_plan() -> None:
    plain, with_engines = (
        candidates(replace(work_for("2k"), scratch=scratch), gpu=True)["highres"][0].memory
        for scratch in ({}, {"highres": 2**30})
    )
    more = with_engines.peak("device") - plain.peak("device")
    assert 0.6 * 2**30 < more < 2**30  # what a chunk takes in PyTorch is part of it
    names = [item.name for item in with_engines.items]
    assert "scratch memory of the engines" in names


@pytest.mark.parametrize(("guidance", "name"), [(1.0, "the prompt"), (0.0, "the negative prompt")])
def test_one_pass_takes_half_the_time_and_shares_no_attention(guidance: float, name: str) -> None:
    work = work_for("2k")
    draft = replace(work.stages["draft"], guidance=guidance)
    alone = replace(work, stages={**work.stages, "draft": draft})
    first = candidates(alone, gpu=True)["draft"][0]
    assert f"one pass per step, with {name}" in first.name
    assert not first.choice.share_attention
    plan = plan_for("2k", 141, 128)
    rates = KNOWN["H200"]
    two = replace(plan.transformers["draft"], share_attention=False)
    plan = replace(plan, transformers={**plan.transformers, "draft": two})
    ratio = (
        seconds_by_stage(alone, plan, rates)["draft"] / seconds_by_stage(work, plan, rates)["draft"]
    )
    assert ratio == pytest.approx(0.5)


def test_what_approximations_in_time_keep_and_save_is_counted() -> None:
    work, budget = work_for("2k"), Budget(host=128 * GIB, device=141 * GIB)
    latent = 4 * 48 * 31 * 90 * 160  # bytes of the high-res one
    options = replace(work.options, guidance_reuse=1, step_cache=0.1)
    changed = replace(work, options=options)
    plans = [make_plan(candidates(one, gpu=True), budget) for one in (work, changed)]
    before, after = ({m.stage: m.peak("device") for m in plan.stages} for plan in plans)
    assert after["highres"] - before["highres"] == latent
    assert after["draft"] - before["draft"] == 2 * 4 * 48 * 31 * 16 * 28
    times = [seconds_by_stage(one, plans[0], KNOWN["H200"]) for one in (work, changed)]
    assert times[1]["highres"] / times[0]["highres"] == pytest.approx(7 / 8)
    assert times[1]["draft"] == times[0]["draft"]
    report = plan_report(changed, plans[1], KNOWN["H200"], verbose=False)
    assert "the draft's before what --step-cache saves" in report
