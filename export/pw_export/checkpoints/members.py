# SPDX-License-Identifier: Apache-2.0
"""The network inside a training checkpoint: which member holds it, which prefix its names share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pw_export.checkpoints.network_kinds import kind_of
from pw_export.checkpoints.tensor_refs import Ref, Refs, renamed, shapes_of
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

# Added to names by FSDP, activation checkpointing and torch.compile.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_PIXELWIZARD = ("generator", "generator_ema")
_MAX_DEPTH = 6
_CHECK = "check that this is the checkpoint you meant"
Say = Callable[[str], None]


def pixelwizard_member(
    path: Path, content: Mapping[Any, object], *, ema: bool, say: Say
) -> tuple[Refs, str]:
    """Return the tensors of a PixelWizard checkpoint, and the member that they come from.

    Uses `generator_ema` if `ema`; otherwise `generator`, else `generator_ema`, else the one network
    that there is. Raises BadWeights.
    """
    members = [name for name in _PIXELWIZARD if name in content]
    if ema and "generator_ema" not in members:
        raise BadWeights(
            f"{path} has no EMA weights",
            got=some_names([str(key) for key in content]),
            wanted="a member named generator_ema",
            do="convert without --ema",
        )
    if not members:
        return sole_network(path, content, say), "bare"
    member = "generator_ema" if ema else members[0]
    if member == "generator_ema" and not ema:
        say(f"{path.name}: no generator, using generator_ema")
    if rest := [str(name) for name in content if name != member]:
        say(f"{path.name}: using its member {member}, not {some_names(rest)}")
    inner = content[member]
    if not isinstance(inner, Mapping):
        raise _no_state_dict(path, f"{member} is a {type(inner).__name__}")
    return sole_network(path, inner, say), member


def sole_network(path: Path, content: Mapping[Any, object], say: Say) -> Refs:
    """Return the tensors of a state dict, or of the only member that is a network, at any depth.

    Raises BadWeights where there is none or several, naming them.
    """
    if not content:
        raise _no_state_dict(path, "an empty dictionary")
    found = dict(_state_dicts(content, ""))
    networks = {n: state for n, state in found.items() if _is_network(path, state)}
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        if not networks:
            return _refs(path, content)
        if _is_network(path, content):
            networks["the file itself"] = content
    if len(networks) > 1:
        raise BadWeights(
            f"{path} holds several networks",
            got=some_names(networks),
            wanted="one",
            do="save the one you mean alone, or under the name generator",
        )
    if not networks and len(found) != 1:
        members = some_names(found or [str(key) for key in content])
        kind = "tensors of no network that is known" if found else "no tensors"
        raise _no_state_dict(path, f"{kind} in its members {members}")
    ((member, state),) = (networks or found).items()
    rest = [str(key) for key in content if str(key) != member.split(".")[0]]
    rest += [name for name in found if name != member and name.split(".")[0] not in rest]
    say(f"{path.name}: using its member {member}" + (f", not {some_names(rest)}" if rest else ""))
    return _refs(path, state)


def unprefixed(where: Path, refs: Refs, say: Say) -> Refs:
    """Remove wrapper infixes, and the leading components that all names share before a network.

    Names of which no known network becomes are left as they are. Says what was removed. Raises
    BadWeights if two names become equal.
    """
    infixes = sorted({infix for name in refs for infix in _WRAPPERS.findall(name)})
    short = {name: _WRAPPERS.sub("", name) for name in refs}
    prefix = ""
    while kind_of({short[name]: ref.shape for name, ref in refs.items()}) is None:
        heads = {name.partition(".")[0] for name in short.values()}
        if len(heads) != 1 or not all(name.partition(".")[2] for name in short.values()):
            return refs
        prefix += f"{heads.pop()}."
        short = {name: rest.partition(".")[2] for name, rest in short.items()}
    if removed := ([prefix] if prefix else []) + infixes:
        say(f"{where.name}: names read without {', '.join(removed)}")
    return renamed(where, refs, short.get)


def _state_dicts(
    content: Mapping[Any, object], above: str, depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, object]]]:
    """Yield the mappings that hold tensors themselves, with their path of keys."""
    for key, value in content.items():
        if not isinstance(value, Mapping) or depth == _MAX_DEPTH:
            continue
        if any(isinstance(inner, torch.Tensor) for inner in value.values()):
            yield f"{above}{key}", value
        else:
            yield from _state_dicts(value, f"{above}{key}.", depth + 1)


def _is_network(path: Path, state: Mapping[Any, object]) -> bool:
    refs = {
        str(name): Ref(tuple(tensor.shape), "", tensor.detach)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }
    try:
        return kind_of(shapes_of(unprefixed(path, refs, lambda line: None))) is not None
    except BadWeights:
        return False


def _refs(path: Path, state: Mapping[Any, object]) -> Refs:
    refs: Refs = {}
    others = []
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if isinstance(tensor, torch.Tensor) and plain and not tensor.is_meta:
            dtype = str(tensor.dtype).removeprefix("torch.")
            refs[str(name)] = Ref(tuple(tensor.shape), dtype, tensor.detach)
        else:
            others.append(f"{name} ({type(tensor).__name__})")
    if others:
        raise BadWeights(
            f"{path} contains objects that are not plain tensors",
            got=some_names(others),
            wanted="names and dense tensors, or one member that holds them",
            do=_CHECK,
        )
    return refs


def _no_state_dict(path: Path, got: str) -> BadWeights:
    return BadWeights(
        f"{path} contains no state dict", got=got, wanted="names and tensors", do=_CHECK
    )
