# SPDX-License-Identifier: Apache-2.0
"""A clip once more, from its receipt alone; and what both receipts say that the runs differ in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pw_runtime.errors import BadRequest
from pw_runtime.job.checks import pick_device
from pw_runtime.job.recorded import Recorded
from pw_runtime.job.sources import source_of
from pw_runtime.sampling.noise import load_noise, tensor_digest
from pw_runtime.types import Preset, Request, RunOptions, computed_stages

# Options that change bits, as receipts name them; engines and tiling have fields of their own.
_OPTIONS: Final = (
    "codec", "precision", "vae_precision", "device", "kernels", "attention", "linear",
    "sparse_attention", "conv", "blocks", "chunk", "step_cache", "guidance_reuse",
    "image_highres", "draft_strength",
)  # fmt: skip
# Those of a later `pw decode` that count in place of the first run's: nothing before uses them,
# but for the sources of a clip, which have a fact of their own.
_OF_FILE: Final = ("options.codec", "options.conv", "options.vae_precision")
_ENCODER: Final = ("options.codec", "versions.av")
_AFTER_LATENTS: Final = (
    *_ENCODER, "engines.vae", "options.conv", "options.vae_precision", "tiling.",
    "video.metadata",
)  # fmt: skip
_BEFORE_LATENTS: Final = (
    "noise.", "engines.draft", "engines.highres", "options.attention", "options.blocks",
    "options.chunk", "options.guidance_reuse", "options.linear", "options.precision",
    "options.sparse_attention", "options.step_cache", "sources.conv", "versions.tokenizers",
    "video.metadata",
)  # fmt: skip
# The first that differs on the way from prompt to file; "unknown" where no latents were kept.
Level = Literal["latents", "frames", "file", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that two receipts say otherwise; None: it has no such entry."""

    name: str
    then: object
    now: object

    def __str__(self) -> str:
        """Return both in a line."""
        said = ["nothing" if x is None else str(x) for x in (self.then, self.now)]
        return f"{self.name}: {said[0]} then, {said[1]} now"


def repeat_request(
    recorded: Recorded, receipt: Path, out: Path, noise: Path | None = None
) -> Request:
    """Return the request that makes the clip of a receipt again, as nearly as this machine can.

    Where it lacks the device, the kernels or the convolutions of that run, those that it has take
    their place; the new receipt says so.

    Args:
        recorded: content of the receipt.
        receipt: its path; latents that were kept beside it hold the noise.
        out: folder for the clip.
        noise: file with the noise of that run; None looks where the receipt says.

    Raises BadRequest where the run started from noise, a picture or a video that is not found any
    more.
    """
    _require_same_sources(recorded, receipt)
    options = _options(recorded)
    found = _noise(recorded, receipt, noise, options)
    return Request(
        prompts=(recorded.prompt,),
        preset=_preset(recorded),
        out=out,
        negative=recorded.negative,
        seed=recorded.seeds["base"],
        noise=found,
        options=options,
    )


def _require_same_sources(recorded: Recorded, receipt: Path) -> None:
    """Raise BadRequest where a picture or a video is gone, or another one has its name."""
    for kind, path in recorded.prompt.sources.items():
        wanted, found = recorded.sources[kind], source_of(path)
        if found.sha256 != wanted.sha256:
            raise BadRequest(
                f"{path} is not the file that {receipt} started from",
                got=f"SHA-256 {found.sha256}",
                wanted=f"SHA-256 {wanted.sha256}",
                do="put the file of that run back",
            )


def _options(recorded: Recorded) -> RunOptions:
    earlier, decode = recorded.options, recorded.finished_from_latents
    if decode is not None:
        conv = earlier.conv if recorded.sources else decode.conv  # what encoded them comes first
        earlier = replace(
            earlier, codec=decode.codec, conv=conv, vae_precision=decode.vae_precision
        )
    try:
        device = str(pick_device(earlier.device))
    except BadRequest:  # why silent: the receipts are compared, and the device is among them
        device = str(pick_device("auto"))
    on_cpu = device.startswith("cpu")
    eager = all(engines["backend"] == "eager" for engines in recorded.engines.values())
    options = replace(
        earlier,
        device=device,
        conv="onednn" if on_cpu and earlier.conv == "onednn" else "auto",
        policy="eager" if eager else earlier.policy,
        save_latents=True,  # they are compared too
    )
    if on_cpu and {earlier.kernels, earlier.attention_kernel} != {"reference"}:
        return replace(options, kernels="reference", attention=None)
    return options


def _preset(recorded: Recorded) -> Preset:
    """Return the preset, with the tiling that ran; engines of a decoder go by the preset's own."""
    engines = recorded.engines.get("vae", {"backend": "eager"})
    if recorded.tiling is None or engines["backend"] != "eager":
        return recorded.preset
    return replace(recorded.preset, decode=recorded.tiling)


def _noise(
    recorded: Recorded, receipt: Path, named: Path | None, options: RunOptions
) -> Path | None:
    """Return the file with the run's noise, found by digest; None where the seeds draw it again."""
    stages = recorded.preset.stages(draft_only=recorded.options.draft_only)
    stages = computed_stages(stages, recorded.prompt, recorded.options)
    kept = recorded.latents_beside(receipt)
    places = [named] if named else [kept, *([Path(x)] if (x := recorded.noise_file) else [])]
    refused = []
    for path in places:
        try:
            noise = load_noise(path, stages, recorded.preset.video)
        except BadRequest as error:
            refused.append(f"{path}: {error.got}")
            continue
        digests = {stage: tensor_digest(x) for stage, x in noise.items()}
        if digests == {stage: recorded.noise.get(stage) for stage in stages}:
            return path
        refused.append(f"{path}: other noise")
    drawn_alike = options.device.split(":")[0] == recorded.options.device.split(":")[0]
    if recorded.noise_file is None and named is None and drawn_alike:
        return None
    raise BadRequest(
        f"the noise that {receipt} started from is not found",
        got="; ".join(refused),
        wanted="noise with SHA-256 "
        + ", ".join(f"{stage} {recorded.noise.get(stage, 'unknown')}" for stage in stages),
        do="give --noise the file of that run, or the clip's latents if they were kept"
        + ("" if drawn_alike else "; seeds draw other numbers on another kind of device"),
    )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return what decides bits and differs between the receipts of two runs of one clip.

    Options that the earlier receipt lacks did not exist then, and groups that it lacks (see
    `unrecorded`) are unknown: they are not among it.
    """
    left, right, unknown = _facts(then), _facts(now), unrecorded(then)
    decode = dict(then.get("finished_from_latents") or {})
    decode.pop("kernel_launches", None)  # of the decode alone
    for name, value in _facts(decode).items():
        if name in _OF_FILE:
            left[name] = value
        elif left.get(name) != value:
            left[f"decode.{name}"] = value
    found = []
    for name in dict.fromkeys((*left, *right)):
        group, value = name.split(".")[0], right.get(name.removeprefix("decode."))
        new = group == "options" and name not in left
        if left.get(name) != value and group not in unknown and not new:
            found.append(Difference(name=name, then=left.get(name), now=value))
    return tuple(found)


def unrecorded(receipt: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the groups of facts that a receipt lacks: an older one, or one of `pw decode`."""
    return tuple(name for name in ("machine", "tiling", "kernel_launches") if name not in receipt)


def _facts(receipt: Mapping[str, Any]) -> dict[str, object]:
    """Return everything that decides bits, by dotted name, of a run or of its later decode."""
    options = receipt.get("options", receipt)
    groups = {
        "bundle": {k: v for k, v in receipt.get("bundle", {}).items() if k == "digest"},
        "noise": receipt.get("noise", {}),
        "options": {name: options[name] for name in _OPTIONS if name in options},
        "engines": {name: x["backend"] for name, x in receipt.get("engines", {}).items()},
        "tiling": receipt.get("tiling") or {},
        "versions": receipt.get("versions", {}),
        "machine": receipt.get("machine") or {},
    }
    facts = {f"{group}.{name}": x for group, one in groups.items() for name, x in one.items()}
    if receipt.get("sources"):  # which the convolutions of the first run encoded
        facts["sources.conv"] = options.get("conv")
    if launched := receipt.get("kernel_launches"):
        facts["kernel_launches"] = ", ".join(sorted(launched))
    facts.pop("versions.python", None)  # it computes nothing
    if "video" in receipt:  # tags came with the digest
        tagged = "sha256" in receipt["video"]
        facts["video.metadata"] = "title, description, comment" if tagged else "none"
    return facts


def can_explain(difference: Difference, level: Level) -> bool:
    """Tell whether a difference could be why the results differ first at this level.

    Equal frames in different files come of encoder and tags, other frames from equal latents of the
    decode, other latents of nothing after them.
    """
    name = difference.name.removeprefix("decode.")
    if level == "file":
        return name in (*_ENCODER, "versions.pixelwizard-runtime", "video.metadata")
    if level == "frames":
        return not name.startswith(_BEFORE_LATENTS)
    return level == "unknown" or not (
        name.startswith(_AFTER_LATENTS) or difference.name.startswith("decode.")
    )
