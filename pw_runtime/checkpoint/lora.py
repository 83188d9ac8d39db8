# SPDX-License-Identifier: Apache-2.0
"""LoRA files: read, checked against a network key by key, and added to its weights.

A weight W becomes W + scale * alpha / rank * up @ down, or W + scale * diff, in fp32 and on the
CPU, whatever device computes: the same bits wherever the weights are kept. LoRAs of one network add
up in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.lora_alpha import adapter_config
from pw_runtime.checkpoint.lora_checks import Change, Difference, checked_changes
from pw_runtime.checkpoint.manifest import Entry, Networks
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.models.finite import is_finite
from pw_runtime.system.input_files import UnreadableInput, open_input
from pw_runtime.system.tensor_file import TensorFile
from pw_runtime.types import DitConfig, LoraFile, LoraSource, StageName

_PICKLES = (b"PK\x03\x04", b"\x80")  # beginnings of what torch.save writes, now and formerly


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA that fits a network.

    Attributes:
        path: of the file.
        source: its name, digest and scale.
        changes: of the network's tensors, by official name.
        file: opened once; its values are read when a weight is merged.
    """

    path: Path = field(compare=False)
    source: LoraSource
    changes: Mapping[str, Change]
    file: TensorFile = field(compare=False, repr=False)

    def touches(self, name: str) -> bool:
        """Tell whether it changes a tensor of the network."""
        return name in self.changes and self.source.scale != 0

    def difference(self, name: str) -> Tensor:
        """Compute what is added to a tensor, in its shape, fp32. Raises BadWeights."""
        change = self.changes[name]
        try:
            self.file.require_unchanged()
            stored = self.file.tensors(change.keys)
        except UnreadableInput as error:
            raise _unreadable(self.path, error) from error
        if isinstance(change, Difference):
            found = stored[change.key].float() * self.source.scale
        else:
            up, down = (stored[key].float().flatten(1) for key in (change.up, change.down))
            found = up @ down  # [N, rank] and [rank, K]
            found = found.mul_(change.factor * self.source.scale).view(change.shape)
        if not is_finite(found):
            raise BadWeights(
                f"the LoRA {self.path} changes {name} by NaN or infinity",
                got=f"scale {self.source.scale:g}, and values whose product is too large for fp32",
                wanted="finite numbers",
                do="name a smaller scale behind the file: FILE:0.5",
            )
        return found


def merged(loras: Iterable[Lora], name: str, weight: Tensor) -> Tensor:
    """Return a stored weight with what LoRAs add to it, fp32; the weight itself where none does."""
    for lora in loras:
        if lora.touches(name):
            weight = lora.difference(name).add_(weight.float())
    return weight


def read_loras(
    files: Mapping[StageName, Sequence[LoraFile]], configs: Mapping[StageName, DitConfig]
) -> dict[StageName, tuple[Lora, ...]]:
    """Open LoRAs, and check each against its network: all keys are used, all values are numbers.

    Args:
        files: by network.
        configs: of the networks that there are.

    Raises BadRequest for a network that is not there, BadWeights naming everything in a file that
    does not fit.
    """
    if missing := files.keys() - configs.keys():
        raise BadRequest(
            f"a LoRA is named for the {missing.pop()} network, and the model has none",
            do="leave --lora-highres out, or convert the checkpoints again with --highres",
        )
    opened: dict[Path, tuple[TensorFile, str | None]] = {}
    loras: dict[StageName, tuple[Lora, ...]] = {}
    for network, chosen in files.items():
        for lora in chosen:
            if lora.path not in opened:
                opened[lora.path] = _opened(lora.path)
            read = _read(lora, *opened[lora.path], network, configs[network])
            loras[network] = (*loras.get(network, ()), read)
    return loras


def with_loras(bundle: Bundle, files: Mapping[StageName, Sequence[LoraFile]]) -> Bundle:
    """Return the bundle with LoRAs for its transformers, in place of those it has.

    Args:
        bundle: an open bundle.
        files: by network.

    Raises BadRequest, BadWeights as `read_loras` does.
    """
    return replace(bundle, loras=read_loras(files, transformer_configs(bundle.networks)))


def transformer_configs(networks: Networks) -> dict[StageName, DitConfig]:
    """Return the config of each transformer that there is."""
    entries: dict[StageName, Entry[DitConfig] | None]
    entries = {"draft": networks.draft, "highres": networks.highres}
    return {name: entry.config for name, entry in entries.items() if entry is not None}


def lora_texts(
    loras: Mapping[StageName, Sequence[Lora]], networks: Collection[StageName]
) -> list[str]:
    """Describe every LoRA of some networks in a line."""
    return [
        f"LoRA of the {network} network: {lora.source.file}, "
        f"scale {lora.source.scale:g}, {len(lora.changes)} tensors{_ranks(lora)}"
        for network, all_of_it in loras.items()
        if network in networks
        for lora in all_of_it
    ]


def _read(
    lora: LoraFile, file: TensorFile, adapter: str | None, network: StageName, config: DitConfig
) -> Lora:
    changes = checked_changes(lora.path, file, adapter, network, config)
    try:
        digest = file.sha256
    except UnreadableInput as error:
        raise _unreadable(lora.path, error) from error
    if adapter is not None:  # it decides the weights, too
        both = f"{digest} {hashlib.sha256(adapter.encode()).hexdigest()}"
        digest = hashlib.sha256(both.encode()).hexdigest()
    source = LoraSource(file=lora.path.name, sha256=digest, scale=lora.scale)
    return Lora(path=lora.path, source=source, changes=changes, file=file)


def _ranks(lora: Lora) -> str:
    """Describe ranks, and factors of which users are often not aware."""
    pairs = [change for change in lora.changes.values() if not isinstance(change, Difference)]
    if not pairs:
        return ", full differences"
    ranks, factors = (_range({getattr(x, name) for x in pairs}) for name in ("rank", "factor"))
    return f", rank {ranks}, alpha / rank {factors}"


def _range(values: set[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _opened(path: Path) -> tuple[TensorFile, str | None]:
    """Open a LoRA, and read the config that PEFT wrote beside it."""
    try:
        file = TensorFile(path)
        return file, adapter_config(path, file.shapes)
    except UnreadableInput as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: UnreadableInput) -> BadWeights:
    if _is_pickle(path):
        return BadWeights(
            f"{path} is a PyTorch pickle, which may run code",
            got="a .pt, .pth, .ckpt or .bin file",
            wanted="a LoRA in a safetensors file",
            do="get its safetensors version, or write one: safetensors.torch.save_file("
            "torch.load(FILE, weights_only=True), NEW_FILE)",
        )
    return BadWeights(
        f"the LoRA {path} cannot be read",
        got=error,
        wanted="a complete safetensors file",
        do="check the path, or download the file again",
    )


def _is_pickle(path: Path) -> bool:
    try:
        with open_input(path) as file:
            return file.read(4).startswith(_PICKLES)
    except (OSError, UnreadableInput):
        return False
