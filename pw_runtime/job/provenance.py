# SPDX-License-Identifier: Apache-2.0
"""The origin of a clip's latents, as their file stores it, and what it may contain."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pw_runtime.errors import BadRequest
from pw_runtime.presets import check_preset
from pw_runtime.prompts import make_prompts
from pw_runtime.sampling.noise import MAX_SEED, seeds_for
from pw_runtime.system.input_files import UnreadableInput, parse_json
from pw_runtime.types import (
    CHUNKS,
    LoraSource,
    Preset,
    Prompt,
    RunOptions,
    Source,
    SourceKind,
    StageConfig,
    StageName,
    TilingConfig,
)

MAX_METADATA: Final = 4 * 2**20  # characters of a clip's description
MAX_POSITION: Final = 10**9  # of a prompt in its file
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DEVICE: Final = re.compile(r"auto|(cpu|cuda)(:\d{1,4})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of the latents of a clip. Bump `format` when a field changes."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    prompt: Prompt
    negative: str
    preset: Preset
    decode: TilingConfig  # of the run's plan, which decides the last bits of the frames
    options: RunOptions
    seeds: dict[str, int]
    noise: dict[str, str]  # SHA-256 of each stage's initial noise
    noise_file: str | None
    bundle: dict[str, str]  # SHA-256 of bundle.json and of every file
    vae: str  # digest of config and weights of the VAE: what the frames depend on
    engines: dict[str, dict[str, str]]
    notices: tuple[str, ...]
    seconds: dict[str, float]  # of the stages that ran
    versions: dict[str, str]
    fallbacks: tuple[str, ...] = ()  # those of the notices; since format 2
    machine: dict[str, str | int] = field(default_factory=dict)  # absent in older files
    sources: dict[SourceKind, Source] = field(default_factory=dict)
    loras: dict[StageName, tuple[LoraSource, ...]] = field(default_factory=dict)
    # Since 3 the file has digests; since 4 options.linear and conv, and the decode has an order;
    # since 5 options.sparse_attention, step_cache and guidance_reuse; since 6 sources and loras,
    # prompt.image and draft_video, options.image_highres and draft_strength.
    format: Literal[1, 2, 3, 4, 5, 6] = 6

    @property
    def stages(self) -> dict[StageName, StageConfig]:
        """The stages of the run, in order; the last one's latent becomes the clip."""
        return self.preset.stages(draft_only=self.options.draft_only)


_PROVENANCE = TypeAdapter(Provenance)


def without_paths(prompt: Prompt) -> Prompt:
    """Return a prompt without the paths of what it starts from, which have digests."""
    return replace(prompt, image=None, draft_video=None)


def source_digests(sources: Mapping[SourceKind, Source]) -> dict[str, str]:
    """Return the SHA-256 of each file that a clip starts from."""
    return {kind: source.sha256 for kind, source in sources.items()}


def provenance_json(provenance: Provenance) -> str:
    """Return the text that a latents file stores."""
    return _PROVENANCE.dump_json(provenance).decode()


def require_storable(provenance: Provenance) -> None:
    """Raise BadRequest where latents of this origin could not be written, or not be read again."""
    try:
        parse_provenance(provenance_json(provenance), Path("latents"))
    except (BadRequest, ValueError) as error:  # the latter for text that is no Unicode
        raise BadRequest(
            f"the latents of prompt {provenance.prompt.id} could not be stored with their origin",
            got=error.got if isinstance(error, BadRequest) else error,
            wanted="a request that `pw decode` can read again",
            do="change what is named",
        ) from error


def parse_provenance(text: str, path: Path) -> Provenance:
    """Read and check the text that the latents file `path` stores.

    Raises BadRequest naming what is wrong: fields, types, and numbers that no run could have had.
    """
    try:
        if len(text) > MAX_METADATA:
            raise UnreadableInput(f"more than {MAX_METADATA} characters")
        content = parse_json(text)
        version = content.get("format") if isinstance(content, dict) else None
        if version in (1, 2, 3):
            text = json.dumps(with_order(content))
    except UnreadableInput as error:
        raise _foreign(path, str(error)) from error
    try:
        provenance = _PROVENANCE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the metadata"
        got = f"format {str(version)[:20]}; {where}: {first['msg']}"
        raise _foreign(path, got, do="finish it with the version of pw that wrote it") from error
    try:
        check_preset(provenance.preset, str(path))
        check_preset(replace(provenance.preset, decode=provenance.decode), str(path))
        make_prompts([(provenance.prompt.id, provenance.prompt.text)])
    except BadRequest as error:  # its advice is for who writes presets and prompts
        raise _foreign(path, f"{error.what}: {error.got}") from error
    if problems := _problems_of(provenance):
        raise _foreign(path, "; ".join(problems))
    return provenance


def with_order(content: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a format before 4, whose decode says where its past frames were."""
    tables = (content, content.get("preset"))
    for table in [one.get("decode") for one in tables if isinstance(one, dict)]:
        if isinstance(table, dict) and "caches" in table:
            table["order"] = {"host": "tiles", "device": "frames"}.get(table.pop("caches"))
    return content


def _problems_of(provenance: Provenance) -> list[str]:
    problems = []
    position, seeds = provenance.prompt.position, provenance.seeds
    base = seeds.get("base", -1)
    if not 1 <= position <= MAX_POSITION:
        problems.append(f"prompt.position is {position}, wanted 1 to {MAX_POSITION}")
    elif not 0 <= base < MAX_SEED or seeds != {"base": base, **asdict(seeds_for(base, position))}:
        problems.append(f"seeds are {seeds}, wanted those of one base seed and this position")
    if not {"draft", "highres"} >= provenance.noise.keys():
        problems.append(f"noise is that of {', '.join(provenance.noise)}")
    if not provenance.bundle.get("digest"):  # synthetic weights have words there
        problems.append("bundle.digest is missing")
    digests = {"vae": provenance.vae}
    digests |= {f"noise.{stage}": digest for stage, digest in provenance.noise.items()}
    digests |= source_digests(provenance.sources)
    loras = {
        f"loras.{x}.{lora.file}": lora for x, all_ in provenance.loras.items() for lora in all_
    }
    digests |= {name: lora.sha256 for name, lora in loras.items()}
    problems += [f"{x}.scale is {y.scale}" for x, y in loras.items() if not math.isfinite(y.scale)]
    problems += [f"{name} is no SHA-256" for name, x in digests.items() if not _SHA256.fullmatch(x)]
    if not all(math.isfinite(x) and x >= 0 for x in provenance.seconds.values()):
        problems.append("seconds are not all finite and at least 0")
    if not 1 <= provenance.options.chunk <= CHUNKS[1]:
        problems.append(f"options.chunk is {provenance.options.chunk}")
    if "auto" in (provenance.options.kernels, provenance.options.attention):
        problems.append("options.kernels or attention is auto, wanted what ran")
    cache = provenance.options.step_cache
    if cache is not None and not 0 < cache < 1:
        problems.append(f"options.step_cache is {cache}")
    if provenance.options.guidance_reuse < 0:
        problems.append(f"options.guidance_reuse is {provenance.options.guidance_reuse}")
    if not 0 <= provenance.options.draft_strength <= 1:
        problems.append(f"options.draft_strength is {provenance.options.draft_strength}")
    if provenance.sources.keys() != provenance.prompt.sources.keys():
        problems.append("sources are not those of the prompt")
    keep = provenance.options.sparse_attention
    if keep is not None and not 0 < keep < 1:
        problems.append(f"options.sparse_attention is {keep}")
    if not _DEVICE.fullmatch(provenance.options.device):
        problems.append(f"options.device is {provenance.options.device!r}")
    return problems


def _foreign(
    path: Path, got: str, do: str = "use the file as `pw generate` wrote it"
) -> BadRequest:
    return BadRequest(
        f"{path} has metadata that this version cannot read",
        got=got,
        wanted="format 1 to 6, as `pw generate` writes it",
        do=do,
    )
