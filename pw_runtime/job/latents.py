# SPDX-License-Identifier: Apache-2.0
"""The latents file: what was computed for a clip, and everything needed to finish the clip.

OUT/<id>.latents.safetensors
    draft_noise, highres_noise          [C, T, H, W] fp32, as --noise takes them
    text_context, negative_context      [E, text_dim]
    draft_latent, highres_latent        [C, T, H, W] fp32
    metadata "pixelwizard"              a `Provenance` as JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    Latent,
    Preset,
    Prompt,
    RunOptions,
    StageConfig,
    StageName,
    TilingConfig,
)

METADATA = "pixelwizard"
SUFFIX = ".latents.safetensors"


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
    format: Literal[1, 2] = 2

    @property
    def stages(self) -> dict[StageName, StageConfig]:
        """The stages of the run, in order; the last one's latent becomes the clip."""
        return self.preset.stages(draft_only=self.options.draft_only)


_PROVENANCE = TypeAdapter(Provenance)


def vae_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of what decides a latent's frames: the VAE's config and its files."""
    entry = bundle.networks.vae
    content = [repr(entry.config), *(bundle.files[name].sha256 for name in entry.files)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def write_latents(path: Path, provenance: Provenance, tensors: Mapping[str, Tensor]) -> None:
    """Write the file, whole or not at all. Raises WriteFailed."""
    on_cpu = {name: x.cpu().contiguous() for name, x in tensors.items()}
    write_tensors(path, on_cpu, {METADATA: _PROVENANCE.dump_json(provenance).decode()})


def read_provenance(path: Path) -> Provenance:
    """Read the metadata of a latents file. Raises BadRequest where it is foreign or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(METADATA)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if raw is None:
        raise BadRequest(
            f"{path} does not describe its clip",
            got=f"a safetensors file without the metadata {METADATA!r}",
            wanted=f"a file <id>{SUFFIX} that `pw generate` left",
            do="if an older version wrote it, repeat its run with `pw generate --noise`",
        )
    try:
        provenance = _PROVENANCE.validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the metadata"
        raise BadRequest(
            f"{path} has metadata that this version cannot read",
            got=f"format {_format_of(raw)}; {where}: {first['msg']}",
            wanted="format 1 or 2",
            do="finish it with the version of pw that wrote it",
        ) from error
    check_preset(provenance.preset, str(path))
    make_prompts([(provenance.prompt.id, provenance.prompt.text)])
    return provenance


def is_resumable(path: Path) -> bool:
    """Tell whether `pw decode` could finish a clip from this file."""
    try:
        provenance = read_provenance(path)
        with safe_open(path, framework="pt") as file:
            return f"{list(provenance.stages)[-1]}_latent" in file.keys()  # noqa: SIM118
    except (BadRequest, OSError, SafetensorError):
        return False


def check_latents(path: Path, bundle: Bundle) -> Provenance:
    """Read a latents file completely and check that `bundle` can finish its clip.

    Raises BadRequest naming what is wrong and what to do.
    """
    provenance = read_provenance(path)
    if provenance.vae != vae_digest(bundle):
        raise BadRequest(
            f"{path} was made for another VAE",
            got=f"{bundle.root}, whose VAE has the digest {vae_digest(bundle)[:16]}",
            wanted=f"a VAE with the digest {provenance.vae[:16]}, as in the bundle with the digest "
            f"{provenance.bundle['digest'][:16]}",
            do="give that bundle to --model; another decoder makes other pictures",
        )
    read_latent(path, provenance, list(provenance.stages)[-1], torch.device("cpu"))
    return provenance


def read_latent(
    path: Path, provenance: Provenance, stage: StageName, device: torch.device
) -> Latent:
    """Read a stage's latent, [C, T, H, W] fp32 on `device`, bit for bit as it was computed.

    Raises BadRequest where it is missing, of another shape or dtype, or not finite.
    """
    stored = read_provenance(path)
    expected = (provenance.prompt, provenance.noise, provenance.seeds)
    if (stored.prompt, stored.noise, stored.seeds) != expected:
        raise BadRequest(
            f"{path} no longer belongs to this clip",
            got=f"the latents of {stored.prompt.text[:60]!r} with other noise",
            do="give two runs two --out folders, and run this one again",
        )
    name, shape = f"{stage}_latent", latent_shape(provenance.stages[stage], provenance.preset.video)
    try:
        with safe_open(path, framework="pt") as file:
            present = name in file.keys()  # noqa: SIM118 (it has no __contains__)
            x = file.get_tensor(name) if present else None
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if x is None:
        raise BadRequest(
            f"{path} ends before the {stage} stage",
            got=f"no {name}",
            do=f"run `pw generate` again with --seed {provenance.seeds['base']}",
        )
    if x.shape != shape or x.dtype != torch.float32:
        raise BadRequest(
            f"{path} contradicts its own preset",
            got=f"{name} {list(x.shape)} of {x.dtype}",
            wanted=f"{name} {list(shape)} of torch.float32",
            do="use the file as `pw generate` wrote it",
        )
    if not x.isfinite().all():
        raise BadRequest(
            f"{path} contains NaN or infinity",
            got=name,
            do="use the file as `pw generate` wrote it: it was finite then",
        )
    return Latent(x=x.to(device))


def _unreadable(path: Path, error: Exception) -> BadRequest:
    return BadRequest(
        f"cannot read the latents file {path}",
        got="a folder" if path.is_dir() else error,
        wanted=f"a complete file <id>{SUFFIX} that `pw generate` left",
        do="check the path; if the file was copied, copy it again",
    )


def _format_of(raw: str) -> object:
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError):
        return "unknown"
    return metadata.get("format", "unknown") if isinstance(metadata, dict) else "unknown"
