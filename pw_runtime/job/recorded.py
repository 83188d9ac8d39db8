# SPDX-License-Identifier: Apache-2.0
"""The request that a receipt records, typed: of this version, and of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from pw_runtime.errors import BadRequest
from pw_runtime.job.latents import SUFFIX
from pw_runtime.job.provenance import with_order
from pw_runtime.job.receipt import read_receipt
from pw_runtime.presets import check_preset
from pw_runtime.sampling.noise import MAX_SEED
from pw_runtime.types import (
    Codec,
    Conv,
    LoraSource,
    Precision,
    Preset,
    Prompt,
    RunOptions,
    Source,
    SourceKind,
    StageConfig,
    StageName,
    TilingConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedFile:
    """A file of the clip; size and digest are absent in older receipts."""

    file: str
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDecode:
    """Settings that `pw decode` finished the clip with, where it did."""

    codec: Codec
    conv: Conv = "onednn"  # there was no other
    vae_precision: Precision = "fp32"
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=dict)
    kernel_launches: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A receipt, its types checked; `receipt` is all of it as it was read.

    Fields that an earlier version did not write are None or empty.
    """

    prompt: Prompt
    negative: str
    preset: Preset
    options: RunOptions
    seeds: dict[str, int]
    noise: dict[str, str]
    noise_file: str | None
    bundle: dict[str, str]
    engines: dict[str, dict[str, Any]]
    versions: dict[str, str]
    video: RecordedFile
    tiling: TilingConfig | None = None
    latents: RecordedFile | None = None
    sources: dict[SourceKind, Source] = field(default_factory=dict)
    loras: dict[StageName, tuple[LoraSource, ...]] = field(default_factory=dict)
    finished_from_latents: RecordedDecode | None = None
    machine: dict[str, str | int] = field(default_factory=dict)
    kernel_launches: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> StageConfig:
        """The stage that the clip shows."""
        return list(self.preset.stages(draft_only=self.options.draft_only).values())[-1]

    def latents_beside(self, receipt: Path) -> Path:
        """Return where the clip's latents are, if they were kept, from the receipt's path."""
        name = f"{receipt.stem}{SUFFIX}" if self.latents is None else self.latents.file
        return receipt.parent / name


_RECORDED: Final = TypeAdapter(Recorded)
_FIELDS: Final = frozenset(Recorded.__dataclass_fields__) - {"receipt"}


def read_recorded(path: Path) -> Recorded:
    """Read a receipt of any format. Raises BadRequest where it is none, damaged or a later one."""
    receipt = read_receipt(path, "check the path: give the receipt of a clip, <id>.json beside it")
    content = with_order({name: receipt[name] for name in _FIELDS & receipt.keys()})
    try:
        recorded = _RECORDED.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _unusable(path, f"{where}: {first['msg']}") from error
    check_preset(recorded.preset, str(path))
    if recorded.tiling is not None:
        check_preset(replace(recorded.preset, decode=recorded.tiling), str(path))
    if problems := _problems_of(recorded):
        raise _unusable(path, "; ".join(problems))
    options = recorded.options
    if "conv" not in receipt["options"]:
        options = replace(options, conv="onednn")  # there was no other
    return replace(recorded, options=options, receipt=receipt)


def _problems_of(recorded: Recorded) -> list[str]:
    problems = []
    if not 0 <= recorded.seeds.get("base", -1) < MAX_SEED:
        problems.append("no base seed that a run can have")
    if recorded.video.file != Path(recorded.video.file).name or "\0" in recorded.video.file:
        problems.append("video.file is no name of a file")
    if recorded.latents is not None and "\0" in recorded.latents.file:
        problems.append("latents.file is no path")
    if recorded.sources.keys() != recorded.prompt.sources.keys():
        problems.append("sources are not those of the prompt")
    if "digest" not in recorded.bundle:
        problems.append("no digest of the bundle")
    if not all(isinstance(x.get("backend"), str) for x in recorded.engines.values()):
        problems.append("no backend of the engines")
    return problems


def _unusable(path: Path, got: str) -> BadRequest:
    return BadRequest(
        f"{path} is a receipt that this version cannot use",
        got=got,
        wanted="a receipt as `pw generate` wrote it",
        do="use the version of pw that wrote it, or make the clip again",
    )
