# SPDX-License-Identifier: Apache-2.0
"""The latents file: what was computed for a clip, and everything needed to finish the clip.

OUT/<id>.latents.safetensors
    draft_noise, highres_noise          [C, T, H, W] fp32, as --noise takes them
    text_context, negative_context      [E, text_dim]
    draft_latent, highres_latent        [C, T, H, W] fp32
    metadata "pixelwizard"              a `Provenance` as JSON
    metadata "sha256"                   JSON: SHA-256 of that text and of every tensor, by name
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest
from pw_runtime.job.provenance import (
    Provenance,
    parse_provenance,
    provenance_json,
    source_digests,
    without_paths,
)
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.system.atomic_files import write_tensors
from pw_runtime.system.input_files import UnreadableInput, parse_json
from pw_runtime.system.tensor_file import DIGESTS, TensorFile, digest_of
from pw_runtime.types import Latent, StageName

METADATA = "pixelwizard"
_FRAMEWORK = ("format", "pt")  # which safetensors adds to the metadata
SUFFIX = ".latents.safetensors"
NO_DIGESTS = (
    "the latents are of a format without digests: that they are as they were computed "
    "cannot be checked"
)


def vae_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of what decides a latent's frames: the VAE's config and its files."""
    entry = bundle.networks.vae
    content = [repr(entry.config), *(bundle.files[name].sha256 for name in entry.files)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def write_latents(path: Path, provenance: Provenance, tensors: Mapping[str, Tensor]) -> None:
    """Write the file, whole or not at all. Raises WriteFailed."""
    on_cpu = {name: x.cpu().contiguous() for name, x in tensors.items()}
    text = provenance_json(provenance)
    write_tensors(path, on_cpu, {METADATA: text, DIGESTS: json.dumps(digests_of(text, on_cpu))})


def read_provenance(path: Path) -> Provenance:
    """Read the metadata of a latents file. Raises BadRequest where it is foreign or damaged."""
    return _provenance(path, _open(path))


def is_resumable(path: Path) -> bool:
    """Tell whether `pw decode` could finish a clip from this file."""
    try:
        return list(_provenance(path, _open(path)).stages)[-1] in stages_of(path)
    except BadRequest:
        return False


def stages_of(path: Path) -> list[StageName]:
    """List the stages whose latents a file has, in order. Raises BadRequest."""
    file = _open(path)
    return [x for x in _provenance(path, file).stages if f"{x}_latent" in file.shapes]


def check_latents(path: Path, bundle: Bundle | None) -> Provenance:
    """Read a latents file completely and check that `bundle`, if one is given, can finish its clip.

    The provenance of a file without digests has NO_DIGESTS among its notices.

    Raises BadRequest naming what is wrong and what to do.
    """
    file = _open(path)
    provenance = _provenance(path, file)
    if bundle is not None and provenance.vae != vae_digest(bundle):
        raise BadRequest(
            f"{path} was made for another VAE",
            got=f"{bundle.root}, whose VAE has the digest {vae_digest(bundle)[:16]}",
            wanted=f"a VAE with the digest {provenance.vae[:16]}, as in the bundle with the digest "
            f"{provenance.bundle['digest'][:16]}",
            do="give that bundle to --model; another decoder makes other pictures",
        )
    tensors = _tensors(path, file)
    _latent(path, provenance, list(provenance.stages)[-1], tensors)
    if DIGESTS not in file.metadata:
        return replace(provenance, notices=(*provenance.notices, NO_DIGESTS))
    return provenance


def read_latent(
    path: Path, provenance: Provenance, stage: StageName, device: torch.device
) -> Latent:
    """Read a stage's latent, [C, T, H, W] fp32 on `device`, bit for bit as it was computed.

    Raises BadRequest where it is missing, altered, of another shape or dtype, or not finite.
    """
    file = _open(path)
    stored = _provenance(path, file)
    expected = _clip_of(provenance)
    if differing := [name for name, x in _clip_of(stored).items() if x != expected[name]]:
        raise BadRequest(
            f"{path} no longer belongs to this clip",
            got=f"the latents of {stored.prompt.text[:60]!r} with other {', '.join(differing)}",
            do="give two runs two --out folders, and run this one again",
        )
    return Latent(x=_latent(path, provenance, stage, _tensors(path, file)).to(device))


def read_sound(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Map the tensors of a latents file that are as they were written.

    Returns:
        These tensors by name, and the names of the others.

    Raises BadRequest where it cannot be read at all.
    """
    file = _open(path)
    text = file.metadata.get(METADATA, "")
    try:
        tensors = file.tensors()
        expected = parse_json(file.metadata.get(DIGESTS, "null"))
    except UnreadableInput as error:
        raise _altered(path, str(error)) from error
    if expected is None:
        return tensors, []
    found = digests_of(text, tensors)
    if not isinstance(expected, dict) or found[METADATA] != expected.get(METADATA):
        return {}, sorted(tensors)
    sound = {name: x for name, x in tensors.items() if found[name] == expected.get(name)}
    return sound, sorted(expected.keys() - sound.keys() - {METADATA})


def _clip_of(provenance: Provenance) -> dict[str, object]:
    """Return what tells the latents of one clip from those of another."""
    return {
        "prompt": without_paths(provenance.prompt),
        "sources": source_digests(provenance.sources),
        "noise": provenance.noise,
        "seeds": provenance.seeds,
    }


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the latents file {path}",
            got=error,
            wanted=f"a complete file <id>{SUFFIX} that `pw generate` left",
            do="check the path; if the file was copied, copy it again",
        ) from error


def _provenance(path: Path, file: TensorFile) -> Provenance:
    text = file.metadata.get(METADATA)
    if text is None:
        raise BadRequest(
            f"{path} does not describe its clip",
            got=f"a safetensors file without the metadata {METADATA!r}",
            wanted=f"a file <id>{SUFFIX} that `pw generate` left",
            do="if an older version wrote it, repeat its run with `pw generate --noise`",
        )
    provenance = parse_provenance(text, path)
    named = {name for name, value in file.metadata.items() if (name, value) != _FRAMEWORK}
    if provenance.format >= 3 and named != {METADATA, DIGESTS}:
        raise _altered(path, f"the metadata {', '.join(sorted(named))}")
    return provenance


def _tensors(path: Path, file: TensorFile) -> dict[str, Tensor]:
    """Map all tensors, and compare them and the metadata with their digests, if there are any."""
    try:
        tensors = file.tensors()
        expected = parse_json(file.metadata[DIGESTS]) if DIGESTS in file.metadata else None
    except UnreadableInput as error:
        raise _altered(path, str(error)) from error
    if expected is None:
        return tensors
    found = digests_of(file.metadata[METADATA], tensors)
    if not isinstance(expected, dict) or found.keys() != expected.keys():
        raise _altered(path, "digests of other tensors")
    if differing := [name for name in found if found[name] != expected[name]]:
        raise _altered(path, f"another SHA-256 of {', '.join(differing)}")
    return tensors


def _latent(
    path: Path, provenance: Provenance, stage: StageName, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return a stage's latent, [C, T, H, W] fp32 on the CPU."""
    name, shape = f"{stage}_latent", latent_shape(provenance.stages[stage], provenance.preset.video)
    if name not in tensors:
        raise BadRequest(
            f"{path} ends before the {stage} stage",
            got=f"no {name}",
            do=f"run `pw generate` again with --seed {provenance.seeds['base']}",
        )
    x = tensors[name]
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
            got=f"{name}, in {int((~x.isfinite()).sum())} of {x.numel()} values",
            do="use the file as `pw generate` wrote it: it was finite then",
        )
    return x


def digests_of(text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return SHA-256 sums: of the metadata, and of dtype, shape and bytes of every tensor."""
    digests = {name: digest_of(x) for name, x in tensors.items()}
    return digests | {METADATA: hashlib.sha256(text.encode()).hexdigest()}


def _altered(path: Path, got: str) -> BadRequest:
    return BadRequest(
        f"{path} was altered or damaged",
        got=got,
        wanted="the file as `pw generate` wrote it",
        do="copy it again from where it was made, or run `pw generate` again",
    )
