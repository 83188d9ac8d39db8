# SPDX-License-Identifier: Apache-2.0
"""`pw repro`: make a clip again from its receipt, and say how far the result is from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.cli.json_output import json_text
from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import (
    FILE,
    FOLDER,
    MODEL,
    gpu_memory_option,
    host_memory_option,
    json_option,
    lora_highres_option,
    lora_option,
    with_chosen_loras,
)
from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.job.recorded import Recorded
    from pw_runtime.job.repeat import Difference, Level
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import LoraFile, LoraSource, StageName


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """Distance of the clip made again from the original; None where that was not kept.

    Attributes:
        same_file: every byte of the video is equal, by its digest.
        latents: relative L2 of each latent; 0 where every bit is equal.
        same_frames: every pixel is equal.
        psnr: of the frames, in dB; None where every pixel is equal.
        max_difference: of a colour of a pixel, of 255.
    """

    same_file: bool | None = None
    latents: dict[str, float] | None = None
    same_frames: bool | None = None
    psnr: float | None = None
    max_difference: int | None = None

    @property
    def reproduced(self) -> bool:
        """The clip is the same to the pixel, or its latents to the bit where no frames are left."""
        if self.same_file or self.same_frames:
            return True
        equal = self.latents is not None and not any(self.latents.values())
        return equal and self.same_frames is None and self.same_file is None

    @property
    def level(self) -> Level | None:
        """The first that differs on the way from prompt to file; None where nothing does."""
        if self.same_file or (self.same_file is None and self.reproduced):
            return None
        if self.same_frames:
            return "file"
        if self.latents is None:
            return "unknown"
        return "latents" if any(self.latents.values()) else "frames"


@click.command()
@click.argument("receipt", type=FILE)
@click.option("--model", type=MODEL, required=True, help="Bundle that made the clip.")
@click.option("--out", type=FOLDER, help="Folder to keep the new clip in. [default: keep none]")
@lora_option
@lora_highres_option
@click.option(
    "--noise", type=FILE, help="File with the noise of that run. [default: as the receipt says]"
)
@gpu_memory_option
@host_memory_option
@logging_options
@json_option
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and the result.")
def repro(
    receipt: Path,
    model: Path,
    out: Path | None,
    loras: tuple[LoraFile, ...],
    loras_highres: tuple[LoraFile, ...],
    noise: Path | None,
    gpu_memory: int | None,
    host_memory: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Make the clip of a receipt again, and say how far it is from the original and why.

    Ends with 0 where every pixel is the same, and with 3 where one is not.
    """
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.job.receipt import read_receipt
    from pw_runtime.job.recorded import read_recorded
    from pw_runtime.job.repeat import repeat_request
    from pw_runtime.pipeline import generate
    from pw_runtime.system.packages import require_packages
    from pw_runtime.system.progress import Reporter

    class Unlisted(Reporter):
        """Prints no path of the new clip, which may be gone at the end."""

        def finished(self, path: Path) -> None:
            """Print nothing."""

    require_packages("`pw repro`", "tokenizers")
    reporter, recorded, bundle = Unlisted(quiet=quiet), read_recorded(receipt), open_bundle(model)
    _require_same_bundle(recorded, receipt, bundle.digest)
    bundle = with_chosen_loras(bundle, {"loras": loras, "loras_highres": loras_highres})
    _require_same_loras(recorded, receipt, bundle)
    original = _original(recorded, receipt, reporter)
    with _folder(out, receipt) as folder:
        request = repeat_request(recorded, receipt, folder, noise)
        request = replace(request, fresh=True, gpu_memory=gpu_memory, host_memory=host_memory)
        (outcome,) = generate(request, bundle, reporter)
        if outcome.video is None:
            return SOME_FAILED  # why silent: the reporter has said it
        made = read_receipt(outcome.video.with_suffix(".json"))
        distance = _compare(recorded, receipt, original, outcome.video)
    kept = None if out is None else outcome.video
    _report(distance, recorded.receipt, made, kept, as_json=as_json)
    return DONE if distance.reproduced else SOME_FAILED


def _report(
    distance: Repetition,
    then: dict[str, Any],
    now: dict[str, Any],
    kept: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print how far the new clip is from the original, and what explains it."""
    from pw_runtime.job.repeat import can_explain, differences, unrecorded

    found, level = differences(then, now), distance.level
    explaining = [x for x in found if level is not None and can_explain(x, level)]
    others, unknown = [x for x in found if x not in explaining], unrecorded(then)
    if not as_json:
        _say(distance, explaining, others, unknown)
        if kept is not None:
            click.echo(kept)
        return
    report = {
        **asdict(distance),
        "reproduced": distance.reproduced,
        "explained_by": [asdict(x) for x in explaining],
        "other_differences": [asdict(x) for x in others],
        "unrecorded": unknown,
        "video": None if kept is None else str(kept),
    }
    click.echo(json_text(report))


def _original(recorded: Recorded, receipt: Path, reporter: Reporter) -> Path | None:
    """Return the original video, where it is there and as its receipt says.

    Raises BadRequest where nothing of the original is left to compare with.
    """
    from pw_runtime.checkpoint.bundle import sha256_of

    video, digest = receipt.parent / recorded.video.file, recorded.video.sha256
    if video.is_file() and digest in (None, sha256_of(video)):
        return video
    if video.is_file():
        reporter.warn(f"{video} is not the file of its receipt: its pixels are not compared")
    elif digest is None and not recorded.latents_beside(receipt).is_file():
        raise BadRequest(
            f"nothing is left of the clip of {receipt} to compare with",
            got=f"no {video.name}, no latents, and a receipt without the video's digest",
            do="put the video beside its receipt",
        )
    return None


def _require_same_bundle(recorded: Recorded, receipt: Path, digest: str) -> None:
    if recorded.bundle["digest"] != digest:
        raise BadRequest(
            f"{receipt} was made with another bundle",
            got=f"a bundle with the digest {digest[:16]}",
            wanted=f"one with the digest {recorded.bundle['digest'][:16]}",
            do="give that bundle to --model; `pw verify RECEIPT --model BUNDLE` names the files",
        )


def _require_same_loras(recorded: Recorded, receipt: Path, bundle: Bundle) -> None:
    """Raise BadRequest unless each network has the LoRAs that it had, wherever they lie."""
    stages = recorded.preset.stages(draft_only=recorded.options.draft_only)
    given = {x: loras for x, loras in bundle.lora_sources.items() if x in stages}
    names = [
        {x: [(lora.sha256, lora.scale) for lora in loras] for x, loras in sources.items() if loras}
        for sources in (given, recorded.loras)
    ]
    if names[0] != names[1]:
        raise BadRequest(
            f"{receipt} was made with other LoRAs",
            got=_lora_list(given),
            wanted=_lora_list(recorded.loras),
            do="name those files with --lora FILE:SCALE and --lora-highres, in this order",
        )


def _lora_list(sources: Mapping[StageName, Sequence[LoraSource]]) -> str:
    """List LoRAs as --lora takes them, with the beginning of each digest."""
    texts = [
        f"{network}: " + ", ".join(f"{x.file}:{x.scale:g} (SHA-256 {x.sha256[:16]})" for x in loras)
        for network, loras in sources.items()
        if loras
    ]
    return "; ".join(texts) or "none"


@contextmanager
def _folder(out: Path | None, receipt: Path) -> Iterator[Path]:
    """Yield the folder for the new clip: `out`, or one that is removed at the end."""
    from tempfile import TemporaryDirectory

    from pw_runtime.system.places import temporary_folder

    if out is None:
        with TemporaryDirectory(prefix="pw-repro-", dir=temporary_folder()) as folder:
            yield Path(folder)
        return
    if out.resolve() == receipt.parent.resolve():
        raise BadRequest(
            "--out is the folder of the original", do="choose another folder, or leave --out out"
        )
    yield out


def _compare(recorded: Recorded, receipt: Path, original: Path | None, video: Path) -> Repetition:
    from pw_bench.clips.compare import latent_differences
    from pw_bench.clips.equivalence import pixel_difference
    from pw_runtime.checkpoint.bundle import sha256_of

    digest = recorded.video.sha256 or (sha256_of(original) if original else None)
    same = None if digest is None else sha256_of(video) == digest
    latents = latent_differences(video, receipt)
    if same or original is None:
        return Repetition(same_file=same, latents=latents or None, same_frames=same or None)
    pixels = pixel_difference(video, original)
    return Repetition(
        same_file=same,
        latents=latents or None,
        same_frames=pixels.max_difference == 0,
        psnr=pixels.psnr,
        max_difference=pixels.max_difference,
    )


def _say(
    distance: Repetition,
    explaining: list[Difference],
    others: list[Difference],
    unknown: tuple[str, ...],
) -> None:
    from pw_runtime.system.printable import printable

    def say(line: str) -> None:
        click.echo(printable(line))

    if distance.same_file:
        say("video: the same file, byte for byte")
    elif distance.same_frames:
        say("video: every pixel is the same; the file has other bytes")
    elif distance.same_frames is None:
        say("video: other bytes; the original is not here, so pixels are not compared")
    else:
        psnr = f"{distance.psnr:.2f} dB PSNR"
        say(f"video: {psnr}, at most {distance.max_difference} of 255 apart")
    for name, error in (distance.latents or {}).items():
        equal = "every bit is the same" if error == 0 else f"relative L2 {error:.1e}"
        say(f"{name.replace('_', ' ')}: {equal}")
    if distance.latents is None:
        say("latents: the original's were not kept")
    if distance.level is not None:
        say("can be explained by:" if explaining else "nothing that is recorded explains it")
        for one in explaining:
            say(f"  {one}")
    if others:
        say("without effect here:" if distance.level is None else "also different:")
        for one in others:
            say(f"  {one}")
    if unknown:
        say(f"its receipt does not have: {', '.join(unknown)}")
