# SPDX-License-Identifier: Apache-2.0
"""`pw decode`: what it leaves, what its receipt says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pw_runtime import resume
from pw_runtime.job.latents import METADATA, NO_DIGESTS, digests_of
from pw_runtime.system.tensor_file import DIGESTS
from tests.e2e.pw import Ended, Pw


@pytest.fixture
def run(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Path:
    """The folder of a run that kept its latents."""
    made = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "run",
        "--prompt", "a cat", "--seed", 7, "--save-latents",
    )  # fmt: skip
    assert made.code == 0, made.err
    return tmp_path / "run"


@pytest.fixture
def latents(run: Path) -> Path:
    return run / "0.latents.safetensors"


@pytest.fixture
def decode(pw: Pw, bundle_dir: Path, latents: Path, tmp_path: Path) -> Callable[..., Ended]:
    def call(*arguments: object) -> Ended:
        return pw("decode", *(arguments or (latents,)), "--model", bundle_dir,
                  "--out", tmp_path / "out")  # fmt: skip

    return call


def rewrite(
    file: Path,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
    change_origin: Callable[[dict], None] = lambda origin: None,
) -> None:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        origin = json.loads(opened.metadata()[METADATA])
    change(tensors)
    change_origin(origin)
    metadata = {METADATA: json.dumps(origin)}
    if origin["format"] >= 3:
        metadata[DIGESTS] = json.dumps(digests_of(metadata[METADATA], tensors))
    save_file(tensors, file, metadata=metadata)


def test_the_file_is_the_one_the_run_made_and_the_receipt_tells_both_runs(
    decode, run, latents, tmp_path
) -> None:
    ended = decode()
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "0.mp4").read_bytes() == (run / "0.mp4").read_bytes()
    assert latents.exists()
    first = json.loads((run / "0.json").read_text())
    second = json.loads((tmp_path / "out" / "0.json").read_text())
    same = ("prompt", "negative", "seeds", "noise", "noise_file", "preset", "options", "bundle")
    for name in (*same, "video", "engines", "notices", "versions", "format"):
        assert second[name] == first[name], name
    # Unknown: what the first run took in all. Known: its stages, and those of this one.
    assert "finished_from_latents" not in first
    assert "peak_memory_bytes" not in second
    assert "kernel_launches" not in second
    assert "load_all_networks" not in second["seconds"]
    for stage in ("text", "draft", "condition", "highres"):
        assert second["seconds"][stage] == first["seconds"][stage]
    assert {"latents", "decode", "write"} <= second["seconds"].keys()
    own = second["finished_from_latents"]
    assert own["latents"] == latents.name
    assert own["peak_memory_bytes"]["host"] > 0
    assert (own["codec"], own["device"], own["kernels"]) == ("h264", "cpu", "reference")
    assert own["versions"]["torch"] == torch.__version__


def test_another_codec_is_taken_and_told(decode, latents, tmp_path) -> None:
    assert decode(latents, "--codec", "ffv1").code == 0
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["video"]["file"] == "0.mkv"
    assert receipt["finished_from_latents"]["codec"] == "ffv1"
    assert receipt["options"]["codec"] == "h264"


def test_a_clip_that_exists_is_replaced_only_on_request(decode, latents, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.mp4").write_bytes(b"another clip")
    refused = decode()
    assert refused.code == 2
    assert "0.mp4 exists" in refused.err
    assert (tmp_path / "out" / "0.mp4").read_bytes() == b"another clip"
    assert decode(latents, "--overwrite").code == 0
    assert (tmp_path / "out" / "0.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("0.mp4", ("--codec", "ffv1"), "0.mp4 would stay beside 0.mkv"),
        ("0.mp4", ("--codec", "ffv1", "--overwrite"), "0.mp4 would stay beside 0.mkv"),
        ("0.mkv", ("--overwrite",), "0.mkv would stay beside 0.mp4"),
        ("0.mp4/", ("--overwrite",), "got: a folder"),
        ("0.json/", ("--overwrite",), "got: a folder"),
    ],
)
def test_what_cannot_be_replaced_is_said_before_anything_is_decoded(
    decode, latents, tmp_path, monkeypatch, name, arguments, says
) -> None:
    monkeypatch.setattr(resume, "load_tensors", lambda *_: pytest.fail("the decoder was read"))
    (tmp_path / "out").mkdir()
    place = tmp_path / "out" / name
    if name.endswith("/"):
        place.mkdir()
    else:
        place.write_bytes(b"another clip")
    ended = decode(latents, *arguments)
    assert ended.code == 2
    assert says in ended.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [place.name]


def test_two_files_for_one_clip_are_refused(decode, latents) -> None:
    ended = decode(latents, latents)
    assert ended.code == 2
    assert "two latents files would become" in ended.err


def test_a_draft_only_run_is_finished_as_one(pw, decode, bundle_dir, preset, tmp_path) -> None:
    made = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "draft",
        "--prompt", "a cat", "--draft-only", "--save-latents",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert decode(tmp_path / "draft" / "0.latents.safetensors").code == 0
    made = [(tmp_path / name / "0.mp4").read_bytes() for name in ("draft", "out")]
    assert made[0] == made[1]


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["highres_latent"][0, 0, 0, 0] = float("nan")


def crop(tensors: dict[str, torch.Tensor]) -> None:
    tensors["highres_latent"] = tensors["highres_latent"][..., :-1].contiguous()


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors["highres_latent"] = tensors["highres_latent"].half()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["highres_latent"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nan, "contains NaN or infinity"),
        (crop, "[48, 2, 6, 11]"),
        (halve, "torch.float16"),
        (drop, "ends before the highres stage"),
    ],
)
def test_latents_of_which_no_clip_can_be_made(decode, latents, tmp_path, change, says) -> None:
    rewrite(latents, change)
    ended = decode()
    assert ended.code == 2
    assert says in ended.err
    assert "do this" in ended.err
    assert not list(tmp_path.glob("out/*"))


def later_format(origin: dict) -> None:
    origin["format"] = 7


@pytest.mark.parametrize(("place", "order"), [("host", "tiles"), ("device", "frames")])
def test_latents_of_format_3_say_where_past_frames_were(
    decode, latents, tmp_path, place, order
) -> None:
    """Format 4 has the order of the decode instead."""

    def earlier(origin: dict) -> None:
        origin["format"] = 3
        for table in (origin["decode"], origin["preset"]["decode"]):
            del table["order"]
            table["caches"] = place

    rewrite(latents, change_origin=earlier)
    assert decode().code == 0
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["preset"]["decode"]["order"] == order


@pytest.mark.parametrize("number", [1, 2])
def test_latents_of_earlier_formats_are_finished_and_named_unchecked(
    decode, latents, tmp_path, number
) -> None:
    """Format 2 added `fallbacks`, format 3 digests, format 4 `conv`: there was only oneDNN."""

    def earlier(origin: dict) -> None:
        origin["format"] = number
        del origin["options"]["conv"]
        if number == 1:
            del origin["fallbacks"]

    rewrite(latents, change_origin=earlier)
    ended = decode()
    assert ended.code == 0
    assert "without digests" in ended.err
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert NO_DIGESTS in receipt["notices"]
    assert receipt["finished_from_latents"]["conv"] == "onednn"


def other_vae(origin: dict) -> None:
    origin["vae"] = "0" * 64


def path_as_id(origin: dict) -> None:
    origin["prompt"]["id"] = "../0"


def keeps_nothing(origin: dict) -> None:
    origin["options"]["sparse_attention"] = 0.0


def odd_frames(origin: dict) -> None:
    origin["preset"]["video"]["frames"] = 6


def on_a_gpu(origin: dict) -> None:
    origin["options"]["kernels"] = "triton"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (later_format, "format 7"),
        (other_vae, "made for another VAE"),
        (path_as_id, "cannot name a file"),
        (odd_frames, "wanted 4n+1"),
        (keeps_nothing, "options.sparse_attention is 0.0"),
        (on_a_gpu, "add --kernels reference"),
    ],
)
def test_origins_that_cannot_be_served(decode, latents, tmp_path, change, says) -> None:
    rewrite(latents, change_origin=change)
    ended = decode()
    assert ended.code == 2
    assert says in ended.err
    assert "do this" in ended.err or "wanted" in ended.err
    assert not list(tmp_path.glob("out/*"))


def test_kernels_can_be_chosen_where_those_of_the_run_are_not_there(decode, latents) -> None:
    rewrite(latents, change_origin=on_a_gpu)
    assert decode(latents, "--kernels", "reference").code == 0


def test_files_that_are_no_latents_files(decode, latents, tmp_path) -> None:
    content = latents.read_bytes()
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    cases = {
        "missing": None,
        "empty": b"",
        "text": b"no safetensors at all",
        "half": content[: len(content) // 2],
        "cut": content[:-1],
    }
    for name, data in cases.items():
        file = tmp_path / name
        if data is not None:
            file.write_bytes(data)
        ended = decode(file)
        assert ended.code == 2, name
        assert f"cannot read the latents file {file}" in ended.err
    ended = decode(foreign)
    assert ended.code == 2
    assert "does not describe its clip" in ended.err
    assert decode(tmp_path).code == 2


def test_damaged_decoder_weights_are_found_first(pw, latents, bundle_dir, tmp_path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_dir, damaged)
    shard = next((damaged / "vae").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ended = pw("decode", latents, "--model", damaged, "--out", tmp_path / "out")
    assert ended.code == 2
    assert shard.name in ended.err


def test_a_file_that_fails_does_not_take_the_others_with_it(
    pw, decode, bundle_dir, preset, latents, tmp_path, monkeypatch
) -> None:
    from pw_runtime import pipeline

    other = latents.with_name("1.latents.safetensors")
    shutil.copy(latents, other)
    rewrite(other, change_origin=lambda origin: origin["prompt"].update(id="1"))
    decode_clip = pipeline.decode_clip

    def fails(vae, run, clip, step):
        if clip.prompt.id == "0":
            raise MemoryError
        return decode_clip(vae, run, clip, step)

    monkeypatch.setattr(pipeline, "decode_clip", fails)
    ended = decode(latents, other)
    assert ended.code == 3
    assert "out of memory" in ended.err
    assert f"the latents of 0 are kept in {latents}" in ended.err
    assert ended.out.split() == [str(tmp_path / "out" / "1.mp4")]


def test_the_vae_alone_is_needed(pw, bundle_dir, latents, tmp_path) -> None:
    copied = tmp_path / "without"
    shutil.copytree(bundle_dir, copied)
    manifest = json.loads((copied / "bundle.json").read_text())
    gone = manifest["networks"]["highres"]["files"]
    manifest["networks"]["highres"] = None
    manifest["files"] = {n: one for n, one in manifest["files"].items() if n not in gone}
    (copied / "bundle.json").write_text(json.dumps(manifest))
    ended = pw("decode", latents, "--model", copied, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err


def test_the_cut_of_the_run_is_kept_where_it_fits(pw, decode, latents, tmp_path) -> None:
    rewrite(latents, change_origin=lambda origin: origin["decode"].update(strips=2))
    assert decode().code == 0
    told = json.loads((tmp_path / "out" / "0.json").read_text())["finished_from_latents"]
    assert any("2 bands" in one for one in told["plan"]["decisions"])
