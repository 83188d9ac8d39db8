# SPDX-License-Identifier: Apache-2.0
"""`pw generate` decodes on the decoder's engines where they are, and says so; frames stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import av
import pytest
import torch

from pw_engines import EngineError, EngineSpec, EngineStore
from pw_engines.eager import EagerEngine
from pw_runtime import resume
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.checkpoint.loader import load_decoder
from pw_runtime.errors import BadRequest
from pw_runtime.execution import engine_lookup
from pw_runtime.execution.compilers import COMPILERS
from pw_runtime.execution.decoder_lookup import decoder_segments, select_decoder_engines
from pw_runtime.execution.engine_lookup import EngineSet, keys_of
from pw_runtime.execution.engine_report import describe_engines
from pw_runtime.job.preflight import computing
from pw_runtime.presets import find_preset
from pw_runtime.types import EnginePolicy, Prompt, Request, RunOptions
from tests.e2e.pw import Ended, Pw
from tests.e2e.test_decode_verb import rewrite

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_dir: Path, preset: Path
) -> Callable[[], None]:
    """Puts engines of the decoder into a store of its own: files that open as the segments."""
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))
    aoti = COMPILERS["aoti"]
    segments = decoder_segments(open_bundle(bundle_dir), find_preset(str(preset)), aoti)
    modules = {one.spec: one.module for one in segments.values()}

    def load(spec: EngineSpec, path: Path, device: torch.device) -> EagerEngine:
        if path.read_text() != "good":
            raise EngineError(f"{path} is no engine")
        return EagerEngine(spec, modules[spec])

    quick = {**COMPILERS, "aoti": replace(aoti, load=load)}
    monkeypatch.setattr(engine_lookup, "COMPILERS", MappingProxyType(quick))

    def put(text: str = "good") -> None:
        store = EngineStore()
        for segment in segments.values():
            (key,) = keys_of(segment, "aoti", COMPILERS["aoti"].platforms(CPU))
            with store.locked(key), store.publishing(key, aoti.file) as path:
                path.write_text(text)

    return put


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Callable[..., Ended]:
    def run(out: str, *more: object) -> Ended:
        ended = pw(
            "generate", "--model", bundle_dir, "--prompt", "a cat", "--preset", preset,
            "--codec", "ffv1", "--out", tmp_path / out, *more,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        return ended

    return run


def receipt(folder: Path) -> dict[str, str]:
    return json.loads((folder / "0.json").read_text())["engines"]["vae"]


def frames(folder: Path) -> list[bytes]:
    with av.open(str(folder / "0.mkv")) as file:
        return [one.to_ndarray(format="rgb24").tobytes() for one in file.decode(video=0)]


def test_frames_by_engines_are_the_decoders(
    generate: Callable[..., Ended], built: Callable[..., None], tmp_path: Path
) -> None:
    without = generate("without")
    assert "running on the CPU in fp32: not compiled (to compile: `pw build" in without.err
    assert receipt(tmp_path / "without")["backend"] == "eager"
    built()
    on = generate("on")
    assert f"decoder on built engines in {tmp_path}/cache/engines (aoti)" in on.err
    assert receipt(tmp_path / "on")["backend"] == "aoti"
    assert frames(tmp_path / "on") == frames(tmp_path / "without")  # eager engines, bit for bit


def test_a_draft_and_policy_eager_take_none(
    generate: Callable[..., Ended], built: Callable[..., None], tmp_path: Path
) -> None:
    built()
    ended = generate("draft", "--draft-only")
    assert "running on the CPU in fp32: not compiled (to compile:" in ended.err
    reason = "its engines fit the high-res picture, and a draft is decoded"
    assert receipt(tmp_path / "draft") == {"backend": "eager", "reason": reason}
    ended = generate("eager", "--policy", "eager", "--draft-only")
    assert "running on the CPU in fp32: not compiled\n" in ended.err
    assert receipt(tmp_path / "eager") == {"backend": "eager", "reason": "asked for"}


@pytest.mark.parametrize("asked", [False, True])
def test_a_decode_takes_engines_where_its_run_did_whatever_kernels_that_had(
    *,
    asked: bool,
    generate: Callable[..., Ended],
    built: Callable[..., None],
    pw: Pw,
    bundle_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen: on a GPU "auto" becomes "triton" beside engines, and that left them out."""
    built()
    generate("run", "--save-latents", *(("--policy", "eager") if asked else ()))

    def as_on_a_gpu(origin: dict) -> None:
        origin["options"] |= {"kernels": "triton"}

    latents = tmp_path / "run" / "0.latents.safetensors"
    rewrite(latents, change_origin=as_on_a_gpu)
    # No kernel of Triton runs here: the references do in their place.
    monkeypatch.setattr(resume, "check_request", lambda request: None)
    monkeypatch.setattr(resume, "_check_kernels", lambda file, request: None)
    monkeypatch.setattr(
        resume, "computing", lambda options: computing(replace(options, kernels="reference"))
    )
    (tmp_path / "decoded").mkdir()
    ended = pw("decode", latents, "--model", bundle_dir, "--out", tmp_path / "decoded")
    assert ended.code == 0, ended.err
    assert ("on built engines in" in ended.err) is not asked
    assert frames(tmp_path / "decoded") == frames(tmp_path / "run")


def request_for(preset: Path, policy: EnginePolicy) -> Request:
    prompt = Prompt(id="0", text="a cat", position=1)
    return Request(
        prompts=(prompt,),
        preset=find_preset(str(preset)),
        out=preset.parent,
        options=RunOptions(policy=policy),
    )


def select(request: Request, bundle: Bundle) -> EngineSet:
    return select_decoder_engines(bundle, request.preset, request.options)


def test_policy_engines_does_without_those_of_the_decoder_and_says_so(
    bundle_dir: Path, preset: Path
) -> None:
    request, bundle = request_for(preset, "engines"), open_bundle(bundle_dir)
    picked = select(request, bundle)
    assert picked.backend == "eager"
    line = describe_engines({"vae": picked}, bundle, request.preset, request.options)
    assert line == "running on the CPU in fp32: not compiled"  # `pw build` makes none there


@pytest.mark.parametrize("policy", ["auto", "engines"])
def test_an_engine_that_cannot_be_opened_is_an_error(
    policy: EnginePolicy, bundle_dir: Path, preset: Path, built: Callable[..., None]
) -> None:
    built("bad")
    with pytest.raises(BadRequest, match=r"(?s)cannot be opened.*is no engine"):
        select(request_for(preset, policy), open_bundle(bundle_dir))


def test_other_sizes_are_other_engines(
    bundle_dir: Path, preset: Path, built: Callable[..., None]
) -> None:
    built()
    request, bundle = request_for(preset, "auto"), open_bundle(bundle_dir)
    assert select(request, bundle).backend == "aoti"
    assert request.preset.highres is not None
    lower = replace(request.preset.highres, height=64)
    other = replace(request, preset=replace(request.preset, highres=lower))
    picked = select(other, bundle)
    assert picked.backend == "eager"
    assert picked.reason == "no engine is built"


def test_baked_segments_are_found_without_their_weights(bundle_dir: Path, preset: Path) -> None:
    """By the digests of the bundle's files: the same keys as those that are built."""
    bundle: Bundle = open_bundle(bundle_dir)
    compiler, plan = COMPILERS["tensorrt"], find_preset(str(preset))
    looked_for = decoder_segments(bundle, plan, compiler)
    made = decoder_segments(bundle, plan, compiler, load_decoder(bundle, CPU))
    assert {n: one.spec for n, one in looked_for.items()} == {n: s.spec for n, s in made.items()}
    for name, one in made.items():
        assert not one.weights
        assert all(x.device == CPU for x in one.module.buffers())
        assert all(x.is_meta for x in looked_for[name].module.buffers())


def test_build_names_what_the_preset_adds(pw: Pw, bundle_dir: Path, preset: Path) -> None:
    build = ("build", "--model", bundle_dir, "--preset", preset, "--dry-run")
    ended = pw(*build)
    assert ended.code == 0, ended.err
    assert "aoti engines for cpu, fp32, up to 8192 tokens" in ended.err
    assert "0 built, 9 to build" in ended.err
    assert "no engines for the decoder: on a CPU" in ended.err
    ended = pw(*build, "--backend", "aoti")
    assert ended.code == 0, ended.err
    assert "0 built, 14 to build" in ended.err
    assert "the decoder's engines are for 192x96 only" in ended.err
    assert "vae_fine_next-aoti-" in ended.err
