# SPDX-License-Identifier: Apache-2.0
"""The latents file: what was computed for a clip, and all it takes to finish the clip from it.

OUT/<id>.latents.safetensors
    draft_noise, highres_noise          [C, T, H, W] fp32, as --noise takes them
    text_context, negative_context      [E, text_dim]
    draft_latent, highres_latent        [C, T, H, W] fp32
    metadata "pixelwizard"              an `Provenance` as JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest
from pw_runtime.presets import check_preset
from pw_runtime.prompts import make_prompts
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.system.atomic_files import write_tensors
from pw_runtime.types import (
    AttentionKernel,
    Codec,
    EnginePolicy,
    Kernels,
    Latent,
    Precision,
    Preset,
    Prompt,
    StageConfig,
    StageName,
    TilingConfig,
)

METADATA = "pixelwizard"
SUFFIX = ".latents.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the run, as receipts have them."""

    codec: Codec
    precision: Precision
    vae_precision: Precision
    device: str
    kernels: Kernels
    attention: AttentionKernel
    policy: EnginePolicy
    chunk: int
    draft_only: bool
    save_latents: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the latents of a clip come from. Whoever changes a field raises `format`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    prompt: Prompt
    negative: str
    preset: Preset
    decode: TilingConfig  # how the run's plan had it, which decides the last bits of the frames
    options: Options
    seeds: dict[str, int]
    noise: dict[str, str]  # SHA-256 of each stage's initial noise
    noise_file: str | None
    bundle: dict[str, str]  # SHA-256 of bundle.json and of every file
    vae: str  # digest of config and weights of the VAE: what the frames depend on
    engines: dict[str, dict[str, str]]
    notices: tuple[str, ...]
    seconds: dict[str, float]  # of the stages that ran
    versions: dict[str, str]
    format: Literal[1] = 1

    @property
    def stages(self) -> dict[StageName, StageConfig]:
        """The stages of the run, in order; the last one's latent becomes the clip."""
        return self.preset.stages(draft_only=self.options.draft_only)


_PROVENANCE = TypeAdapter(Provenance)


def vae_digest(bundle: Bundle) -> str:
    """SHA-256 of what decides the frames of a latent: the VAE's config and its files."""
    entry = bundle.networks.vae
    content = [repr(entry.config), *(bundle.files[name].sha256 for name in entry.files)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def write_latents(path: Path, origin: Provenance, tensors: Mapping[str, Tensor]) -> None:
    """Write the file, whole or not at all. Raises WriteFailed."""
    on_cpu = {name: x.cpu().contiguous() for name, x in tensors.items()}
    write_tensors(path, on_cpu, {METADATA: _PROVENANCE.dump_json(origin).decode()})


def read_provenance(path: Path) -> Provenance:
    """What a latents file says of itself. Raises BadRequest where it is none of ours, or not
    whole."""
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(METADATA)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if raw is None:
        raise BadRequest(
            f"{path} does not say how its clip is finished",
            got=f"a safetensors file without the metadata {METADATA!r}",
            wanted=f"<id>{SUFFIX} as `pw generate` of this version leaves it",
            do="if an older version wrote it, `pw generate --noise` repeats its run",
        )
    try:
        origin = _PROVENANCE.validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the metadata"
        raise BadRequest(
            f"{path} says something else about its clip than this version reads",
            got=f"format {_format_of(raw)}; {where}: {first['msg']}",
            wanted="format 1",
            do="finish it with the version of pw that wrote it",
        ) from error
    check_preset(origin.preset, str(path))
    make_prompts([(origin.prompt.id, origin.prompt.text)])
    return origin


def is_resumable(path: Path) -> bool:
    """Whether this is a latents file that `pw decode` could finish a clip from."""
    try:
        origin = read_provenance(path)
        with safe_open(path, framework="pt") as file:
            return f"{list(origin.stages)[-1]}_latent" in file.keys()  # noqa: SIM118
    except (BadRequest, OSError, SafetensorError):
        return False


def check_latents(path: Path, bundle: Bundle) -> Provenance:
    """Read a latents file wholly and check that `bundle` can finish its clip.

    Raises BadRequest naming what is wrong and what to do.
    """
    origin = read_provenance(path)
    if origin.vae != vae_digest(bundle):
        raise BadRequest(
            f"{path} was made for another VAE",
            got=f"{bundle.root}, whose VAE has the digest {vae_digest(bundle)[:16]}",
            wanted=f"a VAE with the digest {origin.vae[:16]}, as in the bundle with the digest "
            f"{origin.bundle['digest'][:16]}",
            do="give that bundle to --model; another decoder makes other pictures",
        )
    read_latent(path, origin, list(origin.stages)[-1], torch.device("cpu"))
    return origin


def read_latent(path: Path, origin: Provenance, stage: StageName, device: torch.device) -> Latent:
    """A stage's latent, [C, T, H, W] fp32 on `device`, bit for bit as it was computed.

    Raises BadRequest where it is missing, of another shape or dtype, or not finite.
    """
    told = read_provenance(path)
    if (told.prompt, told.noise, told.seeds) != (origin.prompt, origin.noise, origin.seeds):
        raise BadRequest(
            f"{path} is not that of this clip any more",
            got=f"the latents of {told.prompt.text[:60]!r} with other noise",
            do="give two runs two --out folders, and run this one again",
        )
    name, shape = f"{stage}_latent", latent_shape(origin.stages[stage], origin.preset.video)
    try:
        with safe_open(path, framework="pt") as file:
            found = name in file.keys()  # noqa: SIM118 (it has no __contains__)
            x = file.get_tensor(name) if found else None
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if x is None:
        raise BadRequest(
            f"{path} ends before the {stage} stage",
            got=f"no {name}",
            do=f"run `pw generate` again with --seed {origin.seeds['base']}",
        )
    if x.shape != shape or x.dtype != torch.float32:
        raise BadRequest(
            f"{path} does not fit its own preset",
            got=f"{name} {list(x.shape)} of {x.dtype}",
            wanted=f"{name} {list(shape)} of torch.float32",
            do="take the file as `pw generate` wrote it",
        )
    if not x.isfinite().all():
        raise BadRequest(
            f"{path} holds NaN or infinity, of which no picture can be made",
            got=name,
            do="take the file as `pw generate` wrote it: that one was finite",
        )
    return Latent(x=x.to(device))


def _unreadable(path: Path, error: Exception) -> BadRequest:
    return BadRequest(
        f"cannot read the latents file {path}",
        got="a folder" if path.is_dir() else error,
        wanted=f"a whole file <id>{SUFFIX} that `pw generate` left",
        do="check the path; if the file was copied, copy it again",
    )


def _format_of(raw: str) -> object:
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        return "unknown"
    return told.get("format", "unknown") if isinstance(told, dict) else "unknown"
