# SPDX-License-Identifier: Apache-2.0
"""Clips that start from a picture, from the file to the receipt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pw_kernels.op import using
from pw_runtime import Prompt, Reporter, Request, RunOptions, find_preset, generate, open_bundle
from pw_runtime.checkpoint.loader import load_encoder
from pw_runtime.errors import BadRequest
from pw_runtime.job.journal import ClipLog
from pw_runtime.job.preflight import prepare
from pw_runtime.job.recorded import read_recorded
from pw_runtime.job.repeat import can_explain, differences, repeat_request
from pw_runtime.job.verify import verify_all
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.pipeline import encode_prompts, encode_sources
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.system.picture_input import fit_picture, read_picture
from pw_runtime.system.stop import Stopped, StopRequest
from tests.closeness import max_abs
from tests.e2e.pw import Pw, write_preset
from tests.e2e.test_decode_verb import rewrite

DRAFT, HIGHRES = (96, 64), (192, 96)  # of the preset of tests/e2e/pw.py
# Of a receipt; and the file of the latents, which has seconds, too.
MEASURED = ("seconds", "peak_memory_bytes", "plan", "kernel_launches", "latents")


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (120, 80)) -> Path:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size).save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Request:
    image = save_picture(tmp_path / "start.png")
    return Request(
        prompts=(Prompt("a fox", image=image),),
        preset=find_preset(str(write_preset(tmp_path / "p.toml", draft_steps=4, frames=9))),
        out=tmp_path / "out",
        options=RunOptions(device="cpu", codec="ffv1", conv="onednn", save_latents=True),
    )


class Told(Reporter):
    """Collects what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


def make(request: Request, bundle: Path, stop: StopRequest | None = None) -> list[str]:
    told = Told()
    (outcome,) = generate(request, open_bundle(bundle), told, stop=stop)
    assert outcome.error is None
    return told.lines


def latents(request: Request) -> dict[str, Tensor]:
    return load_file(request.out / "0.latents.safetensors")


def receipt(request: Request) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((request.out / "0.json").read_text())
    return content


def first_frame(request: Request, bundle: Path, size: tuple[int, int]) -> Tensor:
    """Encode the picture of a request at a size."""
    image = request.prompts[0].image
    assert image is not None
    encoder = load_encoder(open_bundle(bundle), torch.device("cpu"))
    with torch.inference_mode():
        return encoder.latent_frame(fit_picture(read_picture(image), *size), CausalCache())


def test_the_draft_begins_with_the_picture_and_the_receipt_names_it(
    clip: Request, bundle_dir: Path
) -> None:
    make(clip, bundle_dir)
    made, (prompt,) = latents(clip), clip.prompts
    assert prompt.image is not None
    z = first_frame(clip, bundle_dir, DRAFT)
    assert torch.equal(made["draft_latent"][:, :1], z)
    assert not torch.equal(made["highres_latent"][:, 0], z.new_zeros(()))
    digest = hashlib.sha256(prompt.image.read_bytes()).hexdigest()
    assert receipt(clip)["sources"] == {"image": {"file": "start.png", "sha256": digest}}
    assert receipt(clip)["exactness"]["label"] != "approximate"
    without = replace(clip, prompts=(Prompt("a fox"),), out=clip.out.with_name("without"))
    make(without, bundle_dir)
    assert max_abs(latents(without)["draft_latent"][:, 1:], made["draft_latent"][:, 1:]) > 1e-3


def test_the_high_res_stage_begins_with_the_picture_only_where_asked(
    clip: Request, bundle_dir: Path
) -> None:
    make(clip, bundle_dir)
    z = first_frame(clip, bundle_dir, HIGHRES)
    assert max_abs(latents(clip)["highres_latent"][:, :1], z) > 1e-2
    fixed = replace(
        clip,
        prompts=(*clip.prompts, Prompt("a dog", id="1", position=2)),
        out=clip.out.with_name("fixed"),
        options=replace(clip.options, image_highres=True),
    )
    told = Told()
    generate(fixed, open_bundle(bundle_dir), told)
    assert torch.equal(latents(fixed)["highres_latent"][:, :1], z)
    assert torch.equal(latents(fixed)["draft_latent"], latents(clip)["draft_latent"])
    label = receipt(fixed)["exactness"]
    assert label["label"] == "approximate"
    assert "--image-highres" in label["approximate"][0]
    other = json.loads((fixed.out / "1.json").read_text())
    assert other["exactness"]["label"] != "approximate"  # it starts from no picture
    assert "sources" not in other


@pytest.mark.parametrize("stage", ["draft", "highres"])
def test_a_clip_that_was_ended_goes_on_to_the_same_bytes(
    clip: Request, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    clip = replace(clip, options=replace(clip.options, image_highres=True))
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole, bundle_dir)
    stop, keep = StopRequest(), ClipLog.keep

    def asked(log: ClipLog, state: LoopState) -> None:
        if log.stage == stage:
            stop.request(1e6)
        keep(log, state)

    with monkeypatch.context() as patch:
        patch.setattr(ClipLog, "keep", asked)
        with pytest.raises(Stopped):
            make(clip, bundle_dir, stop)
    assert (clip.out / "0.steps.safetensors").exists()
    assert any(f"of the {stage} stage" in line for line in make(clip, bundle_dir))
    assert (clip.out / "0.mkv").read_bytes() == (whole.out / "0.mkv").read_bytes()
    kept, expected = receipt(clip), receipt(whole)
    for name in MEASURED:
        kept.pop(name), expected.pop(name)
    assert kept == expected


def test_the_same_picture_elsewhere_is_the_same_clip_and_another_is_refused(
    clip: Request, bundle_dir: Path, tmp_path: Path
) -> None:
    make(clip, bundle_dir)
    image = clip.prompts[0].image
    assert image is not None
    moved = image.rename(tmp_path / "moved.png")
    again = replace(clip, prompts=(replace(clip.prompts[0], image=moved),))
    assert any("is finished" in line for line in make(again, bundle_dir))
    save_picture(moved, seed=1)
    with pytest.raises(BadRequest, match="sources"):
        make(again, bundle_dir)


def test_a_clip_is_decoded_from_its_latents_though_the_picture_was_moved(
    clip: Request, bundle_dir: Path, tmp_path: Path
) -> None:
    make(clip, bundle_dir)
    whole = (clip.out / "0.mkv").read_bytes()
    for name in ("0.mkv", "0.json"):  # as if it had been killed in the decode
        (clip.out / name).unlink()
    image = clip.prompts[0].image
    assert image is not None
    moved = image.rename(tmp_path / "moved.png")
    again = replace(clip, prompts=(replace(clip.prompts[0], image=moved),))
    assert any("going on at the decode stage" in line for line in make(again, bundle_dir))
    assert (clip.out / "0.mkv").read_bytes() == whole
    assert [fault for one in verify_all([clip.out], None) for fault in one.faults] == []


def test_a_decode_with_other_convolutions_than_encoded_the_picture_makes_another_clip(
    pw: Pw, clip: Request, bundle_dir: Path
) -> None:
    """Seen: it passed for that of a run with the decode's alone, and was "finished"."""
    make(clip, bundle_dir)
    for name in ("0.mkv", "0.json"):  # as if it had been killed in the decode
        (clip.out / name).unlink()
    file = clip.out / "0.latents.safetensors"
    rewrite(file, change_origin=lambda origin: origin["options"].update(conv="winograd"))
    ended = pw("decode", file, "--model", bundle_dir, "--conv", "onednn", "--device", "cpu")
    assert ended.code == 0, ended.err
    with pytest.raises(BadRequest, match=r'sources\.conv is "winograd", wanted "onednn"'):
        make(clip, bundle_dir)
    recorded = read_recorded(clip.out / "0.json")
    again = repeat_request(recorded, clip.out / "0.json", clip.out)
    assert again.options.conv == "auto"  # that of the encoder, from which the rest follows
    by_onednn = recorded.receipt | {"options": recorded.receipt["options"] | {"conv": "onednn"}}
    (found,) = differences(recorded.receipt, by_onednn)
    assert str(found) == "sources.conv: winograd then, onednn now"
    assert can_explain(found, "latents")


def test_what_was_done_to_the_picture_is_told_and_recorded(
    clip: Request, bundle_dir: Path, tmp_path: Path
) -> None:
    path = save_picture(tmp_path / "tall.png", size=(60, 200))
    with Image.open(path) as image:
        image.convert("CMYK").save(tmp_path / "tall.tif")
    request = replace(clip, prompts=(replace(clip.prompts[0], image=tmp_path / "tall.tif"),))
    told = make(request, bundle_dir)
    notices = receipt(request)["notices"]
    assert any(text.startswith("the picture was converted from CMYK") for text in notices)
    assert any("cut at top and bottom, 85% of it" in text for text in notices)
    assert all(any(text in line for line in told) for text in notices)


def test_a_picture_that_cannot_be_used_ends_the_run_before_it_begins(
    pw: Pw, clip: Request, bundle_dir: Path, tmp_path: Path, preset: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    ended = pw(
        *("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a fox"),
        *("--image", tmp_path / "broken.jpg", "--out", tmp_path / "none"),
    )
    assert ended.code == 2
    assert "broken.jpg cannot be used" in ended.err
    assert not list((tmp_path / "none").glob("0.*"))


def test_memory_that_runs_out_in_the_draft_keeps_the_picture(
    clip: Request, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(clip, out=clip.out.with_name("whole"))
    make(whole, bundle_dir)
    tried: list[bool] = []

    def once(*args: Any, **options: Any) -> Any:
        tried.append(True)
        if len(tried) == 1:
            raise MemoryError("not enough for a test")
        return denoise_draft(*args, **options)

    monkeypatch.setattr("pw_runtime.pipeline.denoise_draft", once)
    make(clip, bundle_dir)
    assert len(tried) == 2
    assert torch.equal(latents(clip)["draft_latent"][:, :1], latents(whole)["draft_latent"][:, :1])


def test_a_gpu_run_encodes_on_the_cpu_without_its_kernels(clip: Request, bundle_dir: Path) -> None:
    with prepare(clip, open_bundle(bundle_dir), Told()) as run:
        encode_prompts(run)
        options = replace(run.request.options, device="cuda", kernels="triton", attention="cudnn")
        assert run.fallback.plan.encode == "host"
        with using("triton", attention="cudnn"):
            encode_sources(replace(run, request=replace(run.request, options=options)))
    (made,) = run.clips
    assert made.error is None
    assert torch.equal(made.fixed["draft"].x, first_frame(clip, bundle_dir, DRAFT))
