# SPDX-License-Identifier: Apache-2.0
"""`pw generate` on several ranks: the same clip, and one ending whatever becomes of a rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file

from pw_bench.ranks import program
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.cli import launch
from pw_runtime.execution.decoder_lookup import select_decoder_engines
from pw_runtime.execution.engine_lookup import NONE_BUILT, EngineSet
from pw_runtime.job import follow as follow_module
from pw_runtime.job import kernel_choice
from pw_runtime.job import take_part as take_part_module
from pw_runtime.job.take_part import take_part
from pw_runtime.presets import PRESETS
from pw_runtime.system import rank_processes
from pw_runtime.system.rank_meeting import Place
from pw_runtime.system.trace import Trace
from pw_runtime.types import (
    Budget,
    DitConfig,
    Prompt,
    Request,
    RunOptions,
    TransformerPlan,
)
from tests.bench.programs import NO_JOB
from tests.convert.loras import random_pairs, tensors_in, write_lora
from tests.e2e.pw import Pw, write_preset
from tests.parallel.command import run_ranks

# 96x64 in the draft, 64x352 after it, 13 frames: 4 x 6 and 4 x 22 tokens, 2 and 6 slices.
ARGUMENTS = ("generate", "--prompt", "a red ball", "--prompt", "a blue ball", "--chunk", 16)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = write_preset(tmp_path / "small.toml", strips=3, frames=13, highres_guidance=1.0)
    # High enough for two bands of the decode.
    highres = path.read_text().replace("width = 192\nheight = 96", "width = 64\nheight = 352")
    path.write_text(highres)
    return path


@pytest.mark.slow
def test_three_ranks_make_the_clips_of_one_bit_for_bit(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    common = (*ARGUMENTS, "--model", bundle_dir, "--preset", preset)
    common += ("--codec", "ffv1", "--save-latents")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert pw(*common, "--out", alone).code == 0
    ended = run_ranks(3, *common, "--out", together, "--dit_fsdp", "--ulysses_size", 3)
    assert ended.codes == (0, 0, 0), ended.stderr
    assert ended.stdout[1:] == ("", "")
    for name in ("0", "1"):
        latents, same = (
            load_file(folder / f"{name}.latents.safetensors") for folder in (alone, together)
        )
        assert latents.keys() == same.keys() >= {"draft_latent", "highres_latent"}
        for kind, x in latents.items():
            assert torch.equal(x, same[kind]), kind
        assert _frames(alone / f"{name}.mkv") == _frames(together / f"{name}.mkv")
        receipt = json.loads((together / f"{name}.json").read_text())
        assert "highres: 3 ranks for each pass" in str(receipt["plan"]["decisions"])


@pytest.mark.slow
def test_ranks_merge_a_lora_into_the_weights_that_they_divide(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    pairs = random_pairs(open_bundle(bundle_dir))
    lora = write_lora(tmp_path / "lora.safetensors", tensors_in("kohya", pairs))
    common = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a red ball")
    common += ("--draft-only", "--save-latents", "--chunk", 16, "--lora", f"{lora}:0.7")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert pw(*common, "--out", alone).code == 0
    ended = run_ranks(2, *common, "--out", together, "--dit_fsdp", "--ulysses_size", 2)
    assert ended.codes == (0, 0), ended.stderr
    latents = [load_file(folder / "0.latents.safetensors") for folder in (alone, together)]
    assert torch.equal(*(x["draft_latent"] for x in latents))
    receipts = [json.loads((folder / "0.json").read_text()) for folder in (alone, together)]
    assert receipts[0]["loras"] == receipts[1]["loras"]
    assert "weights divided among the ranks" in str(receipts[1]["plan"]["decisions"])


@pytest.mark.slow
def test_ranks_leave_out_the_steps_that_one_leaves_out(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    preset = write_preset(tmp_path / "many.toml", draft_steps=10)
    common = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a red ball")
    common += ("--draft-only", "--step-cache", 0.9, "--save-latents", "--chunk", 16)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert pw(*common, "--out", alone).code == 0
    ended = run_ranks(2, *common, "--out", together)
    assert ended.codes == (0, 0), ended.stderr
    latents = [load_file(folder / "0.latents.safetensors") for folder in (alone, together)]
    assert torch.equal(*(x["draft_latent"] for x in latents))
    notices = [json.loads((x / "0.json").read_text())["notices"] for x in (alone, together)]
    assert notices[0] == notices[1]
    assert "steps extrapolated" in notices[0][-1]


@pytest.mark.slow
def test_ranks_keep_the_blocks_of_keys_that_one_device_keeps(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    """600 tokens: 4 of 5 blocks are kept. Each rank has a head."""
    preset = write_preset(tmp_path / "larger.toml", highres_guidance=1.0, highres_steps=1)
    larger = preset.read_text().replace("width = 192\nheight = 96", "width = 640\nheight = 480")
    preset.write_text(larger)
    common = ("generate", "--prompt", "a ball", "--model", bundle_dir, "--preset", preset)
    common += ("--chunk", 128, "--sparse-attention", 0.5, "--save-latents")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert pw(*common, "--out", alone).code == 0
    ended = run_ranks(3, *common, "--out", together, "--ulysses_size", 3)
    assert ended.codes == (0, 0, 0), ended.stderr
    latents, same = (load_file(x / "0.latents.safetensors") for x in (alone, together))
    assert torch.equal(latents["highres_latent"], same["highres_latent"])
    receipt = json.loads((together / "0.json").read_text())
    assert "highres: 3 ranks for each pass" in str(receipt["plan"]["decisions"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "place", "what"),
    [
        ("killed", "draft, step 1", "was killed, or ended without a word"),
        ("stopped", "highres, step 2", "sent no sign for 8 s"),
        ("raises", "highres, step 1", "failed: something that nobody expected"),
        ("killed", "decode, latent frame 2", "was killed, or ended without a word"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_one_error(
    fault: str, place: str, what: str, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common = (*ARGUMENTS, "--model", bundle_dir, "--preset", preset, "--out", out, "--quiet")
    disturbed = 2 if place.startswith("highres") else 1  # the third one waits in the others
    ended = run_ranks(3, *common, fault=fault, rank=disturbed, place=place)
    assert ended.codes[0] == ended.codes[3 - disturbed] == 3
    assert f"error: rank {disturbed} {what}; it was at {place}" in ended.stderr[0]
    assert "error:" not in ended.stderr[3 - disturbed]
    assert not list(out.glob("*.mp4"))
    if place.startswith("decode"):  # both clips can be finished from their latents
        assert ended.stderr[0].count("to finish this clip, run: pw decode") == 2
    elif place.startswith("highres"):
        assert (out / "0.latents.safetensors").exists()


@pytest.mark.slow
def test_every_stage_is_released_before_the_next_one_is_loaded(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    """Otherwise ranks hold the weights of two stages."""
    common = ("--model", bundle_dir, "--preset", preset, "--out", tmp_path / "o", "--dit_fsdp")
    ended = run_ranks(2, *ARGUMENTS, *common, fault="tells", rank=1)
    assert ended.codes == (0, 0), ended.stderr
    commands = ended.stderr[1].split()
    kept = [name for name in commands if name in ("load", "load-decoder", "release", "end")]
    assert kept == ["load", "release", "load", "release", "load-decoder", "release", "end"]


def test_a_rank_releases_its_network_before_it_loads_one_for_a_smaller_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 tells all to load again where one of them was out of memory."""
    alive: list[int] = []
    begun: list[int] = []

    def load_divided(*arguments: object) -> Any:
        begun.append(len(alive))
        alive.append(len(begun))
        return SimpleNamespace(close=alive.pop)

    def next_command() -> dict[str, Any]:
        name = next(names)
        return {"name": name, "stage": "draft", "engines": "", "plan": asdict(TransformerPlan())}

    names = iter(("load", "load", "end"))
    monkeypatch.setattr(follow_module, "load_divided", load_divided)
    monkeypatch.setattr(follow_module, "select_engines", lambda *_: SimpleNamespace(digest=""))
    sent = SimpleNamespace(wait=lambda: None)
    ranks: Any = SimpleNamespace(
        rank=1,
        next_command=next_command,
        at=print,
        group=lambda *arguments: None,
        send=lambda *arguments: sent,
    )
    request: Any = SimpleNamespace(options=None, preset=None, device=torch.device("cpu"))
    bundle: Any = None
    follow_module.follow(ranks, request, bundle)
    assert begun == [0, 0]
    assert alive == [2]


CONFIG = DitConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64)
ENTRY = SimpleNamespace(config=CONFIG)
BUNDLE = SimpleNamespace(weights_digest="", networks=SimpleNamespace(draft=ENTRY, highres=ENTRY))


class Meeting:
    """Two ranks on GPUs that take part one after the other, in this process.

    Attributes:
        identities: that were compared.
        ran: attention of the run, by rank.
        held: bytes of engines that the budget of rank 1 counts.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.identities: list[Mapping[str, str]] = []
        self.ran: list[str | None] = []
        self.held: list[int] = []
        self._told: list[dict[str, Any]] = []
        options = RunOptions(device="cuda", precision="bf16")
        self._request = Request(
            prompts=(Prompt("a cat"),), preset=PRESETS["2k"], out=out, options=options
        )
        engine: Any = SimpleNamespace(scratch=7)
        engines = EngineSet({}, {"block": engine}, "eager", "a test")
        chosen = (SimpleNamespace(choice=name) for name in ("cudnn", "flash"))
        stages = {"draft": engines, "highres": engines}
        for module, name, fake in (
            (take_part_module, "joined", self._joined),
            (take_part_module, "selected", lambda *_: stages),
            (take_part_module, "computing", self._computing),
            (kernel_choice, "measured_attention", lambda *_: next(chosen)),
            (follow_module, "budget_of", self._budget),
            (torch.cuda, "set_device", print),
            (torch.cuda, "get_device_name", str),
        ):
            monkeypatch.setattr(module, name, fake)

    def take_part(self) -> None:
        """Run both ranks: rank 0 first, whose commands rank 1 then obeys."""
        bundle: Any = BUNDLE
        for rank in (0, 1):
            place = Place(rank, 2, rank, "", 0, hosting=False)
            take_part(place, lambda: (self._request, bundle), self.program, say=print)

    def program(self, request: Request, bundle: object, ranks: Any) -> None:
        """Run on rank 0."""
        self.ran.append(request.options.attention)
        ranks.command("budget")

    @contextmanager
    def _joined(
        self, place: Place, prepared: Callable[[], Any], *, deadline: float
    ) -> Iterator[Any]:
        self.identities.append(prepared()[1])
        yield SimpleNamespace(
            rank=place.rank,
            size=place.size,
            all=None,
            sent={"latent": place.rank + 1},
            command=lambda name, **details: self._told.append({"name": name, **details}),
            next_command=lambda: self._told.pop(0),
            gather=lambda *_: SimpleNamespace(wait=print),
        )

    def _computing(self, options: RunOptions) -> nullcontext[None]:
        self.ran.append(options.attention)
        return nullcontext()

    def _budget(self, *arguments: object, ranks: int, held: int) -> Budget:
        self.held.append(held)
        return Budget(host=1, device=1)


def test_all_ranks_run_the_attention_that_the_first_one_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two clocks may choose two implementations: here the second one would be flash."""
    meeting = Meeting(monkeypatch, tmp_path)
    meeting.take_part()
    assert meeting.identities[0] == meeting.identities[1]
    assert meeting.ran == ["cudnn", "cudnn"]


def test_the_memory_that_engines_have_taken_on_a_rank_is_part_of_its_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan counts it, so it would be there twice."""
    meeting = Meeting(monkeypatch, tmp_path)
    meeting.take_part()
    assert meeting.held == [7]


def test_settled_kernels_leave_no_engines_out_on_any_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen: those that "auto" became left out the engines of the decoder."""
    monkeypatch.setenv("PW_CACHE", str(tmp_path))
    bundle: Any = SimpleNamespace(root=tmp_path)
    reasons, computed = [], []

    def select(request: Request) -> None:
        found = select_decoder_engines(bundle, request.preset, request.options)
        reasons.append(found.reason)

    def computing(options: RunOptions) -> nullcontext[None]:
        computed.append(options.kernels)
        return nullcontext()

    meeting = Meeting(monkeypatch, tmp_path)
    monkeypatch.setattr(meeting, "program", lambda request, bundle, ranks: select(request))
    monkeypatch.setattr(take_part_module, "follow", lambda ranks, request, *_: select(request))
    monkeypatch.setattr(take_part_module, "computing", computing)
    meeting.take_part()
    assert reasons == [NONE_BUILT, NONE_BUILT]
    assert computed == ["triton"]


def test_the_ranks_of_a_benchmark_settle_on_the_kernels_and_the_attention_of_a_clip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen: on GPUs every rank but the first ended, as its kernels were still "auto"."""
    Meeting(monkeypatch, tmp_path)
    computed: list[tuple[str, str | None]] = []

    def computing(options: RunOptions) -> nullcontext[None]:
        computed.append((options.kernels, options.attention))
        return nullcontext()

    def generate(request: Request, bundle: object, ranks: object) -> None:
        settled = {"conv": "auto", "kernels": "triton", "attention": "cudnn"}
        receipt = {"peak_memory_bytes": {}, "plan": {"decisions": []}, "options": settled}
        (request.out / "clip.json").write_text(json.dumps(receipt))

    monkeypatch.setattr(take_part_module, "computing", computing)
    monkeypatch.setattr(take_part_module, "follow", print)
    monkeypatch.setattr(program, "_generate", generate)
    monkeypatch.setattr(program, "_bundle", lambda *_: BUNDLE)
    monkeypatch.setattr(program, "Trace", lambda device: Trace(torch.device("cpu")))
    job = replace(NO_JOB, device="cuda", precision="bf16", preset=PRESETS["2k"])
    task = program.RankTask(job=job, folder=tmp_path, divide_weights=False, chunk=8192)
    places = [Place(rank, 2, rank, "", 0, hosting=False) for rank in (0, 1)]
    records = [program.make_part(task, place) for place in places]
    assert computed == [("triton", "cudnn")]
    assert [record.sent for record in records] == [{"latent": 1}, {"latent": 2}]


@pytest.mark.parametrize(("named", "threads"), [(None, 3), ("5", None)])
def test_processes_on_gpus_share_the_cores(
    named: str | None, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    given: list[int | None] = []

    def start(program: object, size: int, *, threads: int | None) -> nullcontext[Any]:
        given.append(threads)
        return nullcontext([SimpleNamespace(wait=lambda: 0)])

    monkeypatch.setattr(rank_processes, "rank_processes", start)
    monkeypatch.setattr(launch, "_cores", lambda: 7)
    assert launch.start_ranks(["cuda:0", "cuda:1"]) == 0
    assert given == [threads]


@pytest.mark.slow
def test_ranks_that_differ_do_not_begin(bundle_dir: Path, preset: Path, tmp_path: Path) -> None:
    common = ("--model", bundle_dir, "--preset", preset, "--prompt", "x", "--out", tmp_path / "o")
    ended = run_ranks(2, "generate", *common, "--ulysses_size", 3)
    assert ended.codes == (2, 3)
    assert ended.stderr[1] == ""
    assert "--ulysses_size is more than there are processes" in ended.stderr[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_processes_of_torchrun_without_a_device_are_told(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    common = ("--model", bundle_dir, "--preset", preset, "--prompt", "x", "--out", tmp_path / "o")
    ended = run_ranks(2, "generate", *common, "--processes", 1)
    assert ended.codes == (2, 3)
    assert "rank 1 has no device of its own" in ended.stderr[0]
    assert "Traceback" not in "".join(ended.stderr)


def test_a_timeout_of_ranks_is_refused_where_there_is_one(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    common = ("--model", bundle_dir, "--preset", preset, "--prompt", "x", "--out", tmp_path / "o")
    ended = pw("generate", *common, "--rank-timeout", 5)
    assert ended.code == 2
    assert "--rank-timeout is for several devices" in ended.err


@pytest.mark.slow
def test_an_error_of_rank_0_is_told_once(bundle_dir: Path, preset: Path, tmp_path: Path) -> None:
    common = ("--model", bundle_dir, "--preset", preset, "--prompt", "x", "--out", tmp_path / "o")
    ended = run_ranks(2, "generate", *common, "--host-memory", "1MiB")
    assert ended.codes == (2, 3)
    assert "this clip does not fit into memory" in ended.stderr[0]
    assert ended.stderr[1] == ""


def _frames(path: Path) -> list[bytes]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in video.decode(video=0)]
