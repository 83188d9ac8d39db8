# SPDX-License-Identifier: Apache-2.0
"""Convert a published checkpoint into a bundle: every weight in it once, or no bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError

from pw_export.baked_loras import BAKED, with_baked
from pw_export.checkpoints.parts import Part
from pw_export.checkpoints.published import Checkpoint, open_checkpoint
from pw_export.checkpoints.tensor_refs import Refs
from pw_export.checkpoints.weight_values import WeightValues
from pw_export.one_conversion import fingerprint, one_conversion
from pw_runtime.checkpoint.bundle import (
    MANIFEST,
    TOKENIZER,
    Bundle,
    ConfigT,
    Entry,
    FileRecord,
    Manifest,
    Networks,
    manifest_json,
    open_bundle,
    sha256_of,
    verify,
)
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.system.atomic_files import (
    atomic_file,
    atomic_folder,
    require_absent,
    write_tensors,
    write_text,
)
from pw_runtime.types import LoraFile, Network

SHARD_BYTES = 2 * 2**30  # also the most tensor data in memory, unless a single tensor is larger
_GIB = 2**30


def convert(
    *,
    wan: Path,
    out: Path,
    draft: Path | None = None,
    highres: Path | None = None,
    ema: bool = False,
    loras: Sequence[LoraFile] = (),
    loras_highres: Sequence[LoraFile] | None = None,
    say: Callable[[str], None] = print,
) -> Bundle:
    """Create the bundle `out` from a Wan2.2-TI2V-5B folder and PixelWizard's checkpoints.

    Every tensor is used exactly once and keeps its dtype; fp8 weights with scales become fp32, and
    so do weights that a LoRA is baked into. All
    names and shapes are checked before the first byte is written, and `out` appears only when it is
    complete and on disk. Where another process makes `out` from the same files meanwhile, its
    bundle is verified and taken.

    Args:
        wan: folder in the official or the diffusers layout, or of single files.
        out: folder that does not exist yet.
        draft: checkpoint that replaces the transformer of `wan`, which is then not read.
        highres: checkpoint of the second stage.
        ema: use the `generator_ema` of `draft` and `highres`.
        loras: baked into both transformers.
        loras_highres: baked into the high-res one in place of these; None: the same.
        say: called with lines of progress.

    Raises BadRequest (`out` exists, `wan` is not a checkpoint), BadWeights (missing, unknown,
    damaged or contradictory tensors, values that are no numbers), WriteFailed (disk full or
    failing).
    """
    require_absent(out)
    return convert_once(
        wan=wan,
        out=out,
        draft=draft,
        highres=highres,
        ema=ema,
        loras=loras,
        loras_highres=loras_highres,
        say=say,
    )


def convert_once(
    *,
    wan: Path,
    out: Path,
    draft: Path | None,
    highres: Path | None,
    ema: bool,
    loras: Sequence[LoraFile] = (),
    loras_highres: Sequence[LoraFile] | None = None,
    say: Callable[[str], None],
) -> Bundle:
    """Return the bundle `out`, made now or by a process that was faster; else as `convert`."""
    if ema and draft is None and highres is None:
        raise BadRequest(
            "--ema needs a PixelWizard checkpoint",
            got="neither --draft nor --highres",
            do="omit --ema, or pass the checkpoint",
        )
    checkpoint = open_checkpoint(wan, draft, highres, ema=ema, say=say)
    checkpoint = with_baked(checkpoint, loras, loras_highres, say)
    baked = [text for name, text in checkpoint.source.items() if name.startswith(BAKED)]
    sources = "-".join((fingerprint(wan, draft, highres), *["ema"] * ema, *baked))
    with one_conversion(out, sources, say):
        if (out / MANIFEST).exists():
            return _taken(out, checkpoint, say)
        with atomic_folder(out, _size(checkpoint), say) as folder:
            _write(checkpoint, folder, say)
    say(f"wrote {out}")
    return open_bundle(out)


def _taken(out: Path, checkpoint: Checkpoint, say: Callable[[str], None]) -> Bundle:
    """Return a bundle that another process made. Raises BadRequest unless it is the same."""
    bundle = open_bundle(out)
    parts = (checkpoint.draft, checkpoint.highres, checkpoint.vae, checkpoint.text_encoder)
    networks = bundle.networks
    entries = (networks.draft, networks.highres, networks.vae, networks.text_encoder)
    same = [entry and entry.config for entry in entries] == [part and part.config for part in parts]
    if not same or bundle.manifest.source != checkpoint.source:
        require_absent(out)
    verify(bundle)
    say(f"{out} was made by another process meanwhile; every file in it was verified")
    return bundle


def _write(checkpoint: Checkpoint, folder: Path, say: Callable[[str], None]) -> None:
    files: dict[str, FileRecord] = {}
    highres = checkpoint.highres
    networks = Networks(
        draft=_write_network("draft", checkpoint.draft, folder, files, say),
        highres=_write_network("highres", highres, folder, files, say) if highres else None,
        vae=_write_network("vae", checkpoint.vae, folder, files, say),
        text_encoder=_write_network("text_encoder", checkpoint.text_encoder, folder, files, say),
    )
    (folder / TOKENIZER).mkdir()
    for file in checkpoint.tokenizer:
        _copy(file, folder / TOKENIZER / file.name)
        _record(folder, f"{TOKENIZER}/{file.name}", files)
    manifest = Manifest(
        format=1,
        created_by=_created_by(),
        source=checkpoint.source,
        networks=networks,
        files=files,
    )
    write_text(folder / MANIFEST, manifest_json(manifest))


def _write_network(
    network: Network,
    part: Part[ConfigT],
    folder: Path,
    files: dict[str, FileRecord],
    say: Callable[[str], None],
) -> Entry[ConfigT]:
    total = sum(ref.num_bytes for ref in part.refs.values())
    say(f"{network}: {len(part.refs)} tensors, {total / _GIB:.2f} GiB")
    (folder / network).mkdir()
    shards, values = _shards(part.refs), WeightValues()
    names = [
        f"{network}/model-{k:05d}-of-{len(shards):05d}.safetensors"
        for k in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        tensors = _read(shard)
        values.look(tensors)
        if not values.unusable:  # else the rest is read only to name all that is wrong
            write_tensors(folder / name, tensors)
            _record(folder, name, files)
            say(f"{name}: {files[name].bytes / _GIB:.2f} GiB")
    values.require_usable(part.what)
    values.warn(part.what, say)
    dtypes = sorted({ref.dtype for ref in part.refs.values()})
    return Entry(config=part.config, dtype="+".join(dtypes), files=tuple(names))


def _shards(refs: Refs) -> list[Refs]:
    shards: list[Refs] = [{}]
    used = 0
    for name, ref in refs.items():
        if shards[-1] and used + ref.num_bytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = ref
        used += ref.num_bytes
    return shards


def _read(refs: Refs) -> dict[str, torch.Tensor]:
    """Read tensors into memory. Raises BadWeights for a file that changed since it was opened."""
    # save_file needs contiguous tensors without shared storage; mapped tensors share the file's.
    try:
        return {
            name: ref.read().clone(memory_format=torch.contiguous_format)
            for name, ref in refs.items()
        }
    except (OSError, SafetensorError) as error:
        raise BadWeights(
            "a weight file cannot be read any more",
            got=error,
            do="check the disk, and that nothing else writes the checkpoint; then convert again",
        ) from error


def _copy(source: Path, path: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise BadWeights(
            f"{source} cannot be read", got=error.strerror, do="download it again"
        ) from error
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def _record(folder: Path, name: str, files: dict[str, FileRecord]) -> None:
    path = folder / name
    files[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def _size(checkpoint: Checkpoint) -> int:
    parts = (checkpoint.draft, checkpoint.highres, checkpoint.vae, checkpoint.text_encoder)
    tensors = sum(ref.num_bytes for part in parts if part for ref in part.refs.values())
    return tensors + sum(file.stat().st_size for file in checkpoint.tokenizer)


def _created_by() -> str:
    try:
        return f"pixelwizard-runtime {version('pixelwizard-runtime')}"
    except PackageNotFoundError:
        return "pixelwizard-runtime, source checkout"
