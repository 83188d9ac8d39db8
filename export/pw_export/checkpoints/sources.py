# SPDX-License-Identifier: Apache-2.0
"""Weight files, alone or as shards with an index, as lazily read tensors with clean names.

Safetensors files and PyTorch pickles are told apart by content, not by name.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pw_export.checkpoints.file_kinds import DOWNLOAD, form_of, require_undamaged
from pw_export.checkpoints.fp8 import dequantised
from pw_export.checkpoints.members import pixelwizard_member, sole_network, unprefixed
from pw_export.checkpoints.tensor_refs import Ref, Refs, require_floats
from pw_export.checkpoints.upstream_configs import read_json
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_PART = re.compile(r"-0*(\d{1,5})-of-(?!0*1\.)(\d{5})\.safetensors$")
_MAX_NAME = 300  # characters; the longest published one has 80
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Index:
    weight_map: dict[str, str]


def read_network(path: Path, say: Say) -> Refs:
    """Open the one network in a file, with its names clean and its weights in floating point.

    Raises BadWeights for anything that is not one network, and says what it is.
    """
    content = _content(path)
    refs = sole_network(path, content, say) if isinstance(content, Mapping) else content.refs
    return _cleaned(path, refs, say)


def read_pixelwizard(path: Path, *, ema: bool, say: Say) -> tuple[Refs, str]:
    """Open a PixelWizard training checkpoint, or a single transformer in any file.

    Uses `generator_ema` if `ema`; otherwise `generator`, else `generator_ema`, else the one network
    in the file.

    Returns:
        The tensors with clean names, and the member that they come from.

    Raises BadWeights, also if two names become equal.
    """
    if part := _PART.search(path.name):
        raise BadWeights(
            f"{path} is one part of a checkpoint in several files",
            got=f"part {int(part[1])} of {int(part[2])}",
            wanted="one file with all tensors",
            do="load all parts and save them as one file; a base model goes to --wan as a folder",
        )
    content = _content(path)
    if isinstance(content, Mapping):
        refs, member = pixelwizard_member(path, content, ema=ema, say=say)
    elif ema:
        raise BadWeights(
            f"{path} has no EMA weights",
            got="a safetensors file, which has no members",
            wanted="a member named generator_ema",
            do="convert without --ema",
        )
    else:
        refs, member = content.refs, "bare"
    return _cleaned(path, refs, say), member


def read_shards(folder: Path, stem: str, say: Say) -> Refs:
    """Open `folder/stem*.safetensors`: a single file, or the shards listed in an index.

    Raises BadWeights for a missing or damaged shard, a tensor in two shards, and any difference
    between the index and the shards.
    """
    index = folder / f"{stem}.safetensors.index.json"
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not os.path.lexists(index):
        if len(files) == 1:
            return read_network(files[0], say)
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
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise BadWeights(
            f"{index} names files outside its folder",
            got=some_names(outside),
            wanted="names of shards beside it",
            do=DOWNLOAD,
        )
    refs: Refs = {}
    for shard in shards:
        in_index = {name for name, file in weight_map.items() if file == shard}
        refs |= _shard(folder / shard, index, in_index, refs)
    return _cleaned(folder, refs, say)


def _shard(path: Path, index: Path, in_index: set[str], earlier: Refs) -> Refs:
    """Open one shard. Raises BadWeights where it differs from the index or repeats a tensor."""
    if form_of(path) != "safetensors":
        raise _misnamed(path)
    refs = open_safetensors(path)
    if duplicates := refs.keys() & earlier.keys():
        raise BadWeights(
            f"{path} repeats tensors of another shard",
            got=some_names(duplicates),
            wanted="every tensor in one shard",
            do=DOWNLOAD,
        )
    if mismatched := refs.keys() ^ in_index:
        raise BadWeights(
            f"{index} and {path.name} disagree",
            got=f"only in one of them: {some_names(mismatched)}",
            wanted="the same tensors in both",
            do="download both again",
        )
    return refs


def _cleaned(where: Path, refs: Refs, say: Say) -> Refs:
    if long := [name for name in refs if len(name) > _MAX_NAME]:
        raise BadWeights(
            f"{where} has a tensor name of {len(long[0]):,} characters",
            got=f"{long[0][:40]}...",
            wanted=f"names of at most {_MAX_NAME}",
            do="check that this is the checkpoint you meant",
        )
    return require_floats(where, unprefixed(where, dequantised(where, refs, say), say))


@dataclass(frozen=True, slots=True)
class _Safetensors:
    """The tensors of a safetensors file, which has no members."""

    refs: Refs


def _content(path: Path) -> _Safetensors | Mapping[object, object]:
    form = form_of(path)
    if form == "safetensors":
        return _Safetensors(open_safetensors(path))
    if path.suffix == ".safetensors":
        raise _misnamed(path)  # torch.load goes by the name
    content = _load_pickle(path, mapped=form == "zip")
    if form == "zip":
        require_undamaged(path)
    if not isinstance(content, Mapping):
        raise BadWeights(
            f"{path} contains no state dict",
            got=type(content).__name__,
            wanted="names and tensors",
            do="check that this is the checkpoint you meant",
        )
    return content


def _misnamed(path: Path) -> BadWeights:
    return BadWeights(
        f"{path} cannot be read",
        got="a PyTorch checkpoint with the name of a safetensors file",
        wanted="a complete safetensors file",
        do="rename it to .pt if you pass it by name; a shard: download it again",
    )


def open_safetensors(path: Path) -> Refs:
    """Read the header of a safetensors file. Raises BadWeights."""
    refs: Refs = {}
    try:
        shard: Any = safe_open(path, framework="pt")
        for name in shard.keys():  # noqa: SIM118
            header = shard.get_slice(name)
            code = str(header.get_dtype())
            shape = tuple(header.get_shape())
            refs[name] = Ref(shape, _DTYPES.get(code, code), partial(shard.get_tensor, name))
    except (OSError, SafetensorError) as error:
        raise BadWeights(
            f"{path} cannot be read",
            got=error,
            wanted="a complete safetensors file",
            do=DOWNLOAD,
        ) from error
    return refs


def _load_pickle(path: Path, *, mapped: bool) -> object:
    """Load without running code from the file; tensors of a zip archive stay mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        # Nothing of torch's messages is passed on: they advise to switch weights_only off.
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and blocked:
            raise BadWeights(
                f"{path} asks to execute code and was not loaded",
                got=f"a pickle that calls {blocked[1]}",
                wanted="tensors only",
                do="get it from a trusted publisher; if it is your own, save only its tensors",
            ) from None
        raise BadWeights(
            f"{path} cannot be read",
            got="a pickle that is damaged, cut short, or of other things than tensors",
            wanted="a complete PyTorch checkpoint",
            do=DOWNLOAD,
        ) from error
