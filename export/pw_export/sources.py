# SPDX-License-Identifier: Apache-2.0
"""Published weight files, safetensors folders and PyTorch pickles, as lazily read tensors."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pw_export.upstream_configs import read_json
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

_DOWNLOAD = "download it again from its publisher"
_SAFETENSORS_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = frozenset(_SAFETENSORS_FLOATS.values())
# Added to names by FSDP, activation checkpointing and torch.compile.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """A tensor on disk; `read` maps it into memory."""

    shape: tuple[int, ...]
    dtype: str  # name in torch, without "torch."
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return prod(self.shape) * itemsize


Refs = dict[str, Ref]


@dataclass(frozen=True, slots=True)
class _Index:
    weight_map: dict[str, str]


def read_safetensors(folder: Path, stem: str) -> Refs:
    """Open `folder/stem*.safetensors`: a single file, or the shards listed in an index.

    Raises BadWeights for a missing or damaged shard, a tensor in two shards, and any difference
    between the index and the shards.
    """
    index = folder / f"{stem}.safetensors.index.json"
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not index.exists():
        if len(files) == 1:
            return _open_safetensors(files[0])
        raise BadWeights(
            f"{folder} has no usable weights",
            got=f"{len(files)} files named {stem}*.safetensors and no {index.name}",
            wanted=f"one file, or {index.name} and the shards it lists",
            do="download the whole folder again",
        )
    weight_map = read_json(index, _Index).weight_map
    shards = sorted(set(weight_map.values()))
    if unnamed := {file.name for file in files} - set(shards):
        raise BadWeights(
            f"{index} does not list every shard in its folder",
            got=some_names(unnamed),
            wanted=some_names(shards),
            do="remove the files that do not belong to this checkpoint",
        )
    refs: Refs = {}
    for shard in shards:
        in_shard = _open_safetensors(folder / shard)
        in_index = {name for name, file in weight_map.items() if file == shard}
        if duplicates := in_shard.keys() & refs.keys():
            raise BadWeights(
                f"{folder / shard} repeats tensors of another shard",
                got=some_names(duplicates),
                wanted="every tensor in one shard",
                do=_DOWNLOAD,
            )
        if mismatched := in_shard.keys() ^ in_index:
            raise BadWeights(
                f"{index} and {shard} disagree",
                got=f"only in one of them: {some_names(mismatched)}",
                wanted="the same tensors in both",
                do="download both again",
            )
        refs |= in_shard
    return refs


def read_state_dict(path: Path) -> Refs:
    """Open a pickled state dict. Raises BadWeights."""
    return _refs(path, _load_pickle(path))


def read_pixelwizard(path: Path, *, ema: bool, say: Callable[[str], None]) -> tuple[Refs, str]:
    """Open a PixelWizard training checkpoint.

    Uses `generator_ema` if `ema`; otherwise `generator`, else `generator_ema`, else the file
    itself. Removes wrapper infixes, and a leading `model.` shared by all names.

    Returns:
        The tensors, and the member that they come from.

    Raises BadWeights, also if two names become equal.
    """
    content = _mapping(path, _load_pickle(path))
    members = [m for m in ("generator", "generator_ema") if m in content]
    if ema and "generator_ema" not in members:
        raise BadWeights(
            f"{path} has no EMA weights",
            got=some_names([str(key) for key in content]),
            wanted="a member named generator_ema",
            do="convert without --ema",
        )
    member = "generator_ema" if ema else members[0] if members else ""
    if member == "generator_ema" and not ema:
        say(f"{path.name}: no generator, using generator_ema")
    refs = _refs(path, content[member] if member else content)
    clean = {name: _WRAPPERS.sub("", name) for name in refs}
    if all(name.startswith("model.") for name in clean.values()):
        clean = {name: short.removeprefix("model.") for name, short in clean.items()}
    return renamed(path, refs, clean.get), member or "bare"


def renamed(where: Path, refs: Refs, translate: Callable[[str], str | None]) -> Refs:
    """Rename tensors. Raises BadWeights for unknown names and for names that become equal."""
    result: Refs = {}
    unknown = []
    for old, ref in refs.items():
        new = translate(old)
        if new is None:
            unknown.append(old)
        elif new in result:
            raise BadWeights(
                f"{where} contains a tensor under two names",
                got=f"{old} and another name, both for {new}",
                wanted="every tensor once",
                do=_DOWNLOAD,
            )
        else:
            result[new] = ref
    if unknown:
        raise BadWeights(
            f"{where} has unknown tensors",
            got=some_names(unknown),
            wanted="the tensors of Wan2.2-TI2V-5B and nothing else",
            do="check that this is the checkpoint you meant",
        )
    return result


def _open_safetensors(path: Path) -> Refs:
    try:
        shard: Any = safe_open(path, framework="pt")
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise BadWeights(
            f"{path} cannot be read",
            got=error,
            wanted="a complete safetensors file",
            do=_DOWNLOAD,
        ) from error
    refs: Refs = {}
    for name in shard.keys():  # noqa: SIM118
        header = shard.get_slice(name)
        code = header.get_dtype()
        refs[name] = Ref(
            shape=tuple(header.get_shape()),
            dtype=_SAFETENSORS_FLOATS.get(code, code),
            read=partial(shard.get_tensor, name),
        )
    return _floats_only(path, refs)


def _mapping(path: Path, content: object) -> Mapping[object, object]:
    if not isinstance(content, Mapping):
        raise BadWeights(
            f"{path} contains no state dict",
            got=type(content).__name__,
            wanted="names and tensors",
            do="check that this is the checkpoint you meant",
        )
    return content


def _refs(path: Path, content: object) -> Refs:
    refs: Refs = {}
    others = []
    for name, tensor in _mapping(path, content).items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if isinstance(tensor, torch.Tensor) and plain and not tensor.is_meta:
            refs[str(name)] = Ref(
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                read=tensor.detach,
            )
        else:
            others.append(str(name))
    if others:
        raise BadWeights(
            f"{path} contains objects that are not plain tensors",
            got=some_names(others),
            wanted="names and dense tensors, or a member named generator or generator_ema",
            do="check that this is the checkpoint you meant",
        )
    return _floats_only(path, refs)


def _floats_only(path: Path, refs: Refs) -> Refs:
    if odd := [f"{name} ({ref.dtype})" for name, ref in refs.items() if ref.dtype not in FLOATS]:
        raise BadWeights(
            f"{path} contains integer or quantised tensors",
            got=some_names(odd),
            wanted=" or ".join(sorted(FLOATS)),
            do="convert the full-precision checkpoint",
        )
    return refs


def _load_pickle(path: Path) -> object:
    """Load without running code from the file; tensors of a zip archive stay mapped."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped and not zipfile.is_zipfile(path):
            raise EOFError("the end of the archive is missing")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked and isinstance(error, pickle.UnpicklingError):
            raise BadWeights(
                f"{path} asks to execute code and was not loaded",
                got=f"a pickle that calls {blocked[1]}",
                wanted="tensors only",
                do="get it from a trusted publisher; if it is your own, save only its tensors",
            ) from None
        raise BadWeights(
            f"{path} cannot be read",
            got=str(error) or type(error).__name__,
            wanted="a complete PyTorch checkpoint",
            do=_DOWNLOAD,
        ) from error


def _unreadable(path: Path, error: OSError) -> BadWeights:
    return BadWeights(
        f"{path} cannot be read",
        got="a folder" if path.is_dir() else error.strerror or "No such file",
        wanted="a weight file",
        do="check the path; if it is right, download the whole checkpoint again",
    )
