# SPDX-License-Identifier: Apache-2.0
"""Plans for several ranks: who computes, what each holds, what they send, and how long it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner, Result
from torch._subclasses.fake_tensor import FakeTensorMode

from pw_bench.measure.tensor_ledger import Ledger
from pw_export import wan22_configs
from pw_export.nano import NANO_VAE
from pw_export.wan22_configs import NETWORKS
from pw_runtime.cli.plan import plan as plan_command
from pw_runtime.errors import BadRequest
from pw_runtime.execution.division import block_traffic, rank_share, run_of, step_traffic
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.models import VaeDecoder
from pw_runtime.models.adapter import SpatialAdapter
from pw_runtime.models.causal_cache import Seam
from pw_runtime.models.tiling import make_bands
from pw_runtime.models.vae_blocks import Upsample
from pw_runtime.planning.candidates import candidates, split_text, splits
from pw_runtime.planning.decode_choices import decode_choices
from pw_runtime.planning.decode_memory import PACKED, busiest_share, decode_memory
from pw_runtime.planning.oom_fallback import plan_run
from pw_runtime.planning.planner import GIB, make_plan
from pw_runtime.planning.rank_report import ranks_report
from pw_runtime.planning.stage_times import seconds_by_stage, traffic_of_decode
from pw_runtime.planning.time_estimate import A_CPU, KNOWN, Rates
from pw_runtime.planning.transformer_memory import stage_memory, weight_bytes
from pw_runtime.planning.workload import Workload, workload
from pw_runtime.presets import PRESETS
from pw_runtime.stages.codecs import RECIPES, pixel_format_for
from pw_runtime.stages.decode_tiles import Bands
from pw_runtime.types import (
    Blocks,
    Budget,
    Codec,
    Compat,
    DecodePlan,
    Prompt,
    Request,
    RunOptions,
    RunPlan,
    Split,
    TilingConfig,
    TransformerPlan,
)

HIGHRES = wan22_configs.HIGHRES


def work_for(ranks: int, preset: str = "4k", *, blocks: Blocks = "segments") -> Workload:
    options = RunOptions(precision="bf16", blocks=blocks)
    return replace(workload(NETWORKS, PRESETS[preset], options, ranks=ranks), process=GIB // 2)


def test_sparse_attention_has_no_more_ranks_than_heads() -> None:
    """Each rank takes all queries of a head; exact attention divides them among more ranks."""
    for keep, ranks in ((None, 32), (0.5, HIGHRES.num_heads)):
        options = RunOptions(precision="bf16", chunk=2048, sparse_attention=keep)
        work = workload(NETWORKS, PRESETS["4k"], options, ranks=32, sequence=32)
        assert splits(work, "highres") == [Split(sequence=ranks)]


def plan_for(work: Workload, gpu: float, host: float = 256) -> RunPlan:
    budget = Budget(host=int(host * GIB), device=int(gpu * GIB))
    return make_plan(candidates(work, gpu=True), budget)


@pytest.mark.parametrize("gpu", [True, False])
def test_one_rank_has_no_division_and_is_the_whole_account(gpu: bool) -> None:
    for stage, options in candidates(work_for(1, "nano"), gpu=gpu).items():
        for option in options:
            assert option.memory.others == ()
            assert option.memory.required("host") == option.memory.peak("host")
            assert "rank" not in option.name, stage
            if isinstance(option.choice, TransformerPlan):
                assert option.choice.split == Split()
                assert option.choice.weights != "gathered"


def test_a_4k_clip_on_eight_h200_divides_every_stage_that_it_can() -> None:
    work = work_for(8)
    plan, alone = plan_for(work, 141), plan_for(work_for(1), 141)
    assert plan.transformers["draft"].split == Split(guidance=2)  # one slice of tokens
    assert plan.transformers["highres"].split == Split(sequence=8)
    assert (plan.decode.ranks, plan.decode.tiling.strips) == (8, 8)
    rates = KNOWN["H200"]
    times, before = (seconds_by_stage(w, p, rates) for w, p in ((work, plan), (work_for(1), alone)))
    assert 6.5 <= before["highres"] / times["highres"] < 8
    assert before["draft"] / times["draft"] < 2
    assert 4 <= before["decode"] / times["decode"] < 8
    slow = replace(rates, link=rates.link and rates.link / 100)
    assert seconds_by_stage(work, plan, slow)["highres"] > 1.2 * times["highres"]


def test_the_fastest_division_comes_first_and_a_slow_link_changes_it() -> None:
    work = work_for(2)
    assert candidates(work, gpu=True)["highres"][0].choice.split == Split(sequence=2)
    slow = replace(work, rates=replace(KNOWN["RTX 4090"], link=1e9))
    assert candidates(slow, gpu=True)["highres"][0].choice.split == Split(guidance=2)


@pytest.mark.parametrize(
    ("name", "division"),
    [
        ("NVIDIA GeForce RTX 4090", Split(guidance=2)),
        ("NVIDIA H200", Split(sequence=2)),
        ("NVIDIA L40S", Split(sequence=2)),  # not known: as an H200
    ],
)
def test_a_run_takes_the_division_that_is_planned_for_its_card(name: str, division: Split) -> None:
    """Seen: `pw plan --gpu "RTX 4090"` showed one division, and the run took an H200's."""
    bundle: Any = SimpleNamespace(networks=NETWORKS, loras={})
    request = Request(
        prompts=(Prompt("a cat"),),
        preset=PRESETS["2k"],
        out=Path("out"),
        options=RunOptions(device="cuda", precision="bf16"),
    )
    budget = Budget(host=256 * GIB, device=141 * GIB)
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_name", return_value=name),
    ):
        engines = {"vae": EngineSet({}, {}, "eager", "")}
        found = plan_run(request, bundle, print, engines, ranks=2, budget=budget)
    assert found.plan.transformers["highres"].split == division


def test_weights_are_divided_where_they_do_not_fit_and_before_they_are_streamed() -> None:
    work = work_for(8, "2k")
    plan = plan_for(work, 12)
    chosen = plan.transformers["highres"]
    assert chosen.weights == "gathered"
    assert "weights divided among the ranks" in plan.decisions[2]
    sizes = weight_bytes(HIGHRES, "bf16")
    held = sum(item.bytes for item in plan.stages[2].items if item.kind == "weights")
    assert held == sizes.rest + sizes.slots + -(-sizes.blocks // 8)
    quantized = replace(work, options=replace(work.options, linear="int8"))
    ways = candidates(quantized, gpu=True)["highres"]
    assert "gathered" not in {way.choice.weights for way in ways}


def test_ranks_that_wait_hold_the_program_alone_and_the_host_is_shared() -> None:
    (way, *_) = [
        way
        for way in candidates(work_for(8), gpu=True)["draft"]
        if way.choice.weights == "streamed"
    ]
    assert way.choice.split == Split(guidance=2)
    host = way.memory.of_ranks("host")
    assert host[2:] == (GIB // 2,) * 6
    assert way.memory.required("host") == sum(host)
    assert min(host[:2]) > weight_bytes(wan22_configs.DRAFT, "bf16").blocks  # each rank's own
    assert way.memory.required("device") == max(way.memory.of_ranks("device"))


@pytest.mark.parametrize("ranks", [2, 3, 7, 8, 28, 31])
def test_shares_make_up_the_whole_and_the_first_rank_takes_the_most(ranks: int) -> None:
    sizes = (100,) * 31
    split = Split(sequence=ranks)
    shares = [rank_share(HIGHRES, split, sizes, passes=2, rank=rank) for rank in range(ranks)]
    assert sum(share.own for share in shares) == 3100
    assert sum(share.heads * share.queries for share in shares) == HIGHRES.num_heads * 3100
    assert {share.passes for share in shares} == {2}
    stage, video = PRESETS["4k"].stages()["highres"], PRESETS["4k"].video
    plan = TransformerPlan(split=split)
    peaks = [
        sum(item.bytes for item in stage_memory(HIGHRES, stage, video, "bf16", plan, rank=rank))
        for rank in (0, ranks - 1)
    ]
    assert peaks[0] > peaks[1]


@pytest.mark.parametrize("ranks", [2, 5, 9])
def test_traffic_is_what_leaves_the_slices_and_comes_back(ranks: int) -> None:
    config = replace(HIGHRES, dim=256, num_heads=4)
    sizes = (10,) * 4 + (9,) * 7
    each = block_traffic(config, ranks, sizes, 2)
    assert sum(rank.sent for rank in each) == sum(rank.received for rank in each)
    shared, step = (
        step_traffic(
            *(config, Split(sequence=ranks), sizes), passes=2, itemsize=2, share_attention=share
        )
        for share in (True, False)
    )
    assert step.exchange == 2 * config.num_layers * sum(rank.sent for rank in each)
    assert step.exchange - shared.exchange == sum(rank.sent for rank in each)
    if ranks == 2:  # each sends half of its queries, keys, values and of its results
        assert each[0].sent == 2 * 64 * 2 * (3 * 58 + 45)


def test_one_rank_runs_engines_that_hold_attention() -> None:
    for blocks in ("attention", "whole"):
        ways = candidates(work_for(2, blocks=blocks), gpu=True)["highres"]
        assert {way.choice.split for way in ways} == {Split()}
        assert "gathered" not in {way.choice.weights for way in ways}


@pytest.mark.parametrize(("ranks", "bands"), [(2, 3), (8, 8)])
def test_a_decode_has_a_band_for_each_rank_or_those_of_the_preset(ranks: int, bands: int) -> None:
    plans = [plan for plan, _ in decode_choices(work_for(ranks, "2k"), gpu=True)]
    assert (plans[0].tiling.strips, plans[0].ranks) == (bands, ranks)
    assert {plan.tiling.order for plan in plans if plan.ranks == 1} == {"tiles"}
    official = replace(PRESETS["2k"], decode=TilingConfig(tiling="official", strips=3))
    work = replace(work_for(ranks, "2k"), preset=official)
    assert {plan.ranks for plan, _ in decode_choices(work, gpu=True)} == {1}


def test_a_decode_that_is_to_go_tile_by_tile_runs_on_one_rank() -> None:
    preset = replace(PRESETS["2k"], decode=TilingConfig(order="tiles", strips=3))
    plans = decode_choices(replace(work_for(4, "2k"), preset=preset), gpu=True)
    assert {(plan.ranks, plan.tiling.order) for plan, _ in plans} == {(1, "tiles")}


@pytest.mark.parametrize(("ranks", "most"), [(3, 3), (6, 4)])
def test_engines_divide_their_strips_and_send_no_rows(ranks: int, most: int) -> None:
    cut = replace(PRESETS["nano-hd"], decode=TilingConfig(strips=4))
    work = replace(work_for(ranks, "nano-hd"), preset=cut)
    work = replace(work, decoder_engines=True, scratch={"vae": GIB})
    plan, items = next(iter(decode_choices(work, gpu=True)))
    assert plan.engines
    assert plan.ranks == len(items) == most
    assert traffic_of_decode(work, plan).border == 0
    whole = next(iter(decode_choices(replace(work, ranks=1), gpu=True)))[1][0]
    caches = [sum(x.bytes for x in rank if x.kind == "caches") for rank in (whole, *items)]
    assert max(caches[1:]) < caches[0] < sum(caches[1:])  # all repeat the coarse part


def decoded_by(rank: int, ranks: int, strips: int, rows: int, columns: int) -> int:
    """Peak of the tensors of one rank's decode of three latent frames, without pixels.

    Rows from above arrive before a frame, and those for below are sent during the next one.
    """
    net = VaeDecoder(NANO_VAE).requires_grad_(False)
    bands, frames = make_bands(rows, strips, NANO_VAE), 3
    owned = run_of(len(bands), ranks, rank)

    def tiles() -> Bands:
        return Bands(net, bands, columns, frames, torch.device("cpu"), torch.empty_like)

    latent = torch.empty(48, frames, rows, columns)
    above, seams = tiles(), []
    for t, frame in enumerate(latent.split(1, dim=1)):
        shared = above.shared(frame)
        for index in range(owned.start):
            above.tile(index, t, shared)
        seams.append(above._seams.pop(t, Seam()).rows)
    del above, shared
    with Ledger() as ledger:
        taps = [m.made_taps() for m in net.modules() if isinstance(m, Upsample)]
        ledger.enter([*net.parameters(), *taps], "weights")
        ledger.enter([latent], "latent")
        ledger.restart()
        own, sent = tiles(), None
        for t, frame in enumerate(latent.split(1, dim=1)):
            if owned.start:
                rows_above = {module: x.clone() for module, x in seams[t].items()}
                own._seams[t] = Seam(rows=rows_above)
                del rows_above
            shared = own.shared(frame)
            for index in owned:
                own.tile(index, t, shared)
            del shared
            sent = own._seams.pop(t, None)
        del sent
    return ledger.peak["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_decode_of_a_rank_takes_what_its_closed_form_says(rank: int) -> None:
    with FakeTensorMode(), torch.inference_mode():
        wanted = decoded_by(rank, 3, 3, 48, 40)
    sizes = {"frames": 3, "rows": 48, "columns": 40, "strips": 3}
    items = decode_memory(NANO_VAE, **sizes, ranks=3, rank=rank)
    got = sum(item.bytes for item in items if item.place == "device")
    assert got == pytest.approx(wanted, rel=0.05)


def test_work_on_bands_adds_up_and_the_top_band_has_the_most() -> None:
    config = wan22_configs.VAE
    assert busiest_share(config, 134, 240, 8, 1) == 1
    assert 1 / 8 < busiest_share(config, 134, 240, 8, 8) < 1.25 / 8
    assert busiest_share(config, 90, 160, 3, 2) > 0.6  # two bands of three


def test_features_of_all_tokens_are_counted_where_they_are_cut() -> None:
    """They are computed whole on every rank; with many ranks that is the peak of the stage."""
    config = replace(HIGHRES, dim=512, num_heads=8, adapter_dim=128)
    with FakeTensorMode(), torch.inference_mode():
        adapter = SpatialAdapter(config)
        low = {name: weight.bfloat16() for name, weight in adapter.state_dict().items()}
        adapter.load_state_dict(low, assign=True)
        draft = torch.zeros(48, 31, 45, 80)
        with Ledger() as ledger:
            ledger.enter([*adapter.parameters(), draft], "inputs")
            ledger.restart()
            held = ledger.peak["cpu"]
            adapter.control_features(draft)
        peak = ledger.peak["cpu"] - held
    stage, video = PRESETS["2k"].stages()["highres"], PRESETS["2k"].video
    plan = TransformerPlan(split=Split(sequence=8), chunk=512)
    items = stage_memory(config, stage, video, "bf16", plan, rank=7)
    counted = sum(x.bytes for x in items if x.name in ("features of the draft", "adapter"))
    assert counted == pytest.approx(peak, rel=0.05)


def test_more_ranks_than_any_stage_can_use_are_refused_with_the_number_that_is_useful() -> None:
    with pytest.raises(BadRequest, match="at most 76") as refused:
        candidates(work_for(77, "2k"), gpu=True)
    assert "draft 2, highres 28, decode 76" in str(refused.value)
    assert "smaller --chunk" in str(refused.value)


def test_what_fits_no_rank_is_refused_as_for_one_device() -> None:
    with pytest.raises(BadRequest, match=r"does not fit into memory \(too large: draft, highres"):
        plan_for(work_for(8), 2)


def test_the_report_names_who_waits_and_compares_the_divisions() -> None:
    work = work_for(8)
    text = ranks_report(work, plan_for(work, 24), KNOWN["H200"], verbose=True)
    assert "draft: 6 of 8 ranks wait: its 3472 tokens are 1 slice of up to 8192" in text
    assert "highres: modelled divisions: 8 ranks for each pass 43" in text
    assert "highres: at its peak, rank 1" in text
    assert "450 GB/s" in text
    alone = ranks_report(work, plan_for(work, 141), None, verbose=False)
    assert "times: only with --gpu" in alone
    assert "speed-up" not in alone


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (Split(), "1 rank"),
        (Split(guidance=2), "2 passes x 1 rank"),
        (Split(guidance=2, sequence=4), "2 passes x 4 ranks"),
        (Split(sequence=8), "8 ranks for each pass"),
    ],
)
def test_divisions_have_names(split: Split, text: str) -> None:
    assert split_text(split) == text


def run(*arguments: str) -> Result:
    options = ("--preset", "2k", "--host-memory", "64GiB")
    with patch("torch.cuda.is_available", return_value=False):
        return CliRunner().invoke(plan_command, [*options, *arguments], standalone_mode=False)


def test_the_command_line_plans_for_devices_that_are_not_here() -> None:
    ended = run("--devices", "8x24GiB", "--gpu", "RTX 4090", "--link", "6GiB")
    assert "8 devices, each with 24.0 GiB of GPU memory; 64.0 GiB of host memory" in ended.output
    assert "6.44 GB/s" in ended.output
    on_a_cpu = run("--devices", "2", "--precision", "fp32", "--draft-only")
    assert "2 processes on the CPU, 64.0 GiB of host memory for all" in on_a_cpu.output
    assert "times: none, as the processes share the cores" in on_a_cpu.output


@pytest.mark.parametrize(
    ("rates", "division"), [(A_CPU, (1, 2)), (replace(A_CPU, link=1e6), (2, 1))]
)
def test_the_command_line_plans_processes_on_a_cpu_with_the_rates_of_their_run(
    rates: Rates, division: tuple[int, int]
) -> None:
    with patch("pw_runtime.planning.time_estimate.A_CPU", rates):
        ended = run("--devices", "2", "--precision", "bf16", "--json")
    split = json.loads(ended.output)["transformers"]["highres"]["split"]
    assert (split["guidance"], split["sequence"]) == division


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "0"), "invalid devices '0': expected e.g. 8 or 8x24GiB"),
        (("--devices", "8x"), "invalid size ''"),
        (("--devices", "8x24GiB", "--gpu-memory", "24GiB"), "named twice"),
        (("--gpu-memory", "24GiB", "--gpu", "H200", "--link", "6GiB"), "got: one device"),
        (("--devices", "8x24GiB", "--link", "6GiB"), "got: no --gpu"),
    ],
)
def test_devices_that_cannot_be_planned_are_refused(
    arguments: tuple[str, ...], message: str
) -> None:
    ended = run(*arguments)
    assert message in str(ended.exception)


def test_a_machine_with_fewer_gpus_is_named() -> None:
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=2),
    ):
        ended = CliRunner().invoke(
            plan_command, ["--preset", "2k", "--devices", "4"], standalone_mode=False
        )
    assert "this machine has fewer GPUs than --devices" in str(ended.exception)


def test_every_gpu_with_known_rates_can_be_named() -> None:
    (option,) = [one for one in plan_command.params if one.name == "gpu"]
    assert list(option.type.choices) == list(KNOWN)
    assert all(rates.link for rates in KNOWN.values())


@pytest.mark.parametrize("codec", RECIPES)
@pytest.mark.parametrize("truncating", [False, True])
def test_frames_in_rgb_count_three_bytes_a_pixel(codec: Codec, truncating: bool) -> None:
    """Seen: every codec counted as planes, with half as many."""
    work = replace(work_for(2, "2k"), options=RunOptions(precision="bf16", codec=codec))
    compat = Compat(truncating_uint8=truncating)
    work = replace(work, preset=replace(work.preset, compat=compat))
    planes = replace(work, options=RunOptions(precision="bf16", codec="h264"))
    planes = replace(planes, preset=PRESETS["2k"])
    times = 2 if pixel_format_for(codec, compat) == "rgb24" else 1
    plan = next(plan for plan, _ in decode_choices(work, gpu=True) if plan.ranks == 2)
    pixels, fewer = (traffic_of_decode(one, plan).pixels for one in (work, planes))
    assert pixels == times * fewer
    packed, less = (
        next(item.bytes for item in items if item.name == PACKED)
        for one in (work, planes)
        for _, (items, *_) in [next(decode_choices(one, gpu=True))]
    )
    assert packed == times * less


def test_frames_that_stay_in_memory_are_rgb() -> None:
    work = work_for(1, "2k")
    assert replace(work, in_memory=True).frame_bytes == 2 * work.frame_bytes == 3 * 2560 * 1440


def test_a_decode_on_one_rank_sends_nothing() -> None:
    work = work_for(8)
    assert traffic_of_decode(work, DecodePlan(tiling=work.tiling)).total == 0
