# SPDX-License-Identifier: Apache-2.0
"""The converted checkpoint on disk: its content; opening, verifying and reading it.

    BUNDLE/bundle.json                              configs, file sizes and SHA-256 sums
    BUNDLE/draft/model-00001-of-0000n.safetensors   official tensor names
    BUNDLE/highres/...                              may be absent
    BUNDLE/vae/...                                  official tensor names
    BUNDLE/text_encoder/...                         transformers tensor names
    BUNDLE/tokenizer/...                            as published

Only `pw convert` (pw_export.convert) writes bundles.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pw_runtime.checkpoint.limits import declared_layers, stored_layers
from pw_runtime.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    REMAKE,
    ConfigT,
    Entry,
    FileRecord,
    Manifest,
    Networks,
    manifest_json,
    parse_manifest,
    some_names,
    unusable,
)
from pw_runtime.errors import BadWeights
from pw_runtime.system.input_files import MAX_JSON, UnreadableInput, open_input, read_input
from pw_runtime.system.tensor_file import TensorFile
from pw_runtime.types import LoraFile, LoraSource, Network, StageName

if TYPE_CHECKING:
    from pw_runtime.checkpoint.lora import Lora

__all__ = [  # with what `manifest` has for others
    "FORMAT",
    "MANIFEST",
    "TOKENIZER",
    "Bundle",
    "ConfigT",
    "Entry",
    "FileRecord",
    "Manifest",
    "Networks",
    "check_tensors",
    "load_tensors",
    "manifest_json",
    "open_bundle",
    "read_verified",
    "require_shapes",
    "require_unchanged",
    "sha256_of",
    "some_names",
    "verify",
]

TOKENIZER = "tokenizer"
SHARD = ".safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of weights, as safetensors names them

# Files that identify a folder as a published checkpoint.
_CHECKPOINT_MARKS = (
    "model_index.json",
    "config.json",
    "Wan2.2_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "transformer",
    "diffusion_models",
    "split_files",
)
_HASH_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle.

    Attributes:
        root: its folder.
        digest: SHA-256 of bundle.json, which pins every other file.
        manifest: the content of bundle.json.
        synthetic_tensors: returns the tensors of a network, for benchmarks without weight files.
        opened: its shards by name, each opened once: what is hashed is what is computed with.
        loras: what is added to the weights of its transformers (`lora.with_loras`).
    """

    root: Path
    digest: str
    manifest: Manifest
    synthetic_tensors: Callable[[Network], dict[str, torch.Tensor]] | None = None
    opened: dict[str, TensorFile] = field(default_factory=dict, compare=False, repr=False)
    loras: Mapping[StageName, tuple[Lora, ...]] = field(default_factory=dict)

    @property
    def lora_sources(self) -> dict[StageName, tuple[LoraSource, ...]]:
        """File, digest and scale of every LoRA, by network."""
        return {stage: tuple(x.source for x in loras) for stage, loras in self.loras.items()}

    @property
    def lora_files(self) -> dict[StageName, tuple[LoraFile, ...]]:
        """Path and scale of every LoRA, by network, for other processes that open the bundle."""
        return {
            stage: tuple(LoraFile(x.path, x.source.scale) for x in loras)
            for stage, loras in self.loras.items()
        }

    @property
    def weights_digest(self) -> str:
        """A text that is equal for equal weights: `digest`, and LoRAs with their scales."""
        used = [
            f"{stage}:{x.sha256}*{x.scale!r}"
            for stage, sources in self.lora_sources.items()
            for x in sources
        ]
        return " + ".join((self.digest, *used))

    @property
    def networks(self) -> Networks:
        """Configs, dtypes and shards of the networks."""
        return self.manifest.networks

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and digest of every file, by relative path."""
        return self.manifest.files

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.root / TOKENIZER


def open_bundle(path: Path | str) -> Bundle:
    """Read and check bundle.json, but not the files that it lists (see `verify`).

    Raises BadWeights when `path` holds no bundle, or one of another format.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        raw = read_input(file, MAX_JSON)
    except UnreadableInput as error:
        if os.path.lexists(file):
            raise unusable(file, str(error)) from error
        raise _no_bundle(path, error) from error
    manifest = parse_manifest(raw, file)
    return Bundle(root=path, digest=hashlib.sha256(raw).hexdigest(), manifest=manifest)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(bundle: Bundle, names: Collection[str] | None = None) -> None:
    """Check sizes, then SHA-256 sums, of all files of the bundle or of those in `names`.

    Shards stay open, and `load_tensors` reads from the open file: one that takes the name of a
    verified shard is not used. One that is overwritten in place is noticed by the next load.

    Raises BadWeights naming the first file that differs from bundle.json.
    """
    chosen = list(bundle.files if names is None else names)
    for name in chosen:
        _check_size(bundle, name)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for check in [pool.submit(_check_digest, bundle, name) for name in chosen]:
            check.result()


def read_verified(bundle: Bundle, name: str) -> bytes:
    """Return the content of a file of the bundle. Raises BadWeights where it is another one."""
    _check_size(bundle, name)
    try:
        content = read_input(bundle.root / name, bundle.files[name].bytes)
    except UnreadableInput as error:
        raise _damaged(bundle.root / name, error) from error
    _require_digest(bundle, name, hashlib.sha256(content).hexdigest())
    return content


def check_tensors(
    bundle: Bundle, network: Network, prefix: tuple[str, ...] = ("",)
) -> tuple[str, ...]:
    """Check names and shapes of a network's tensors from the headers; return its shards' names.

    Nothing is built before the files have as many layers as the config declares.

    Raises BadWeights as `load_tensors` does, digests apart.
    """
    from pw_runtime.models import expected_shapes

    entry = _entry(bundle, network)
    what, shapes = f"the {network} network of {bundle.root}", _stored_shapes(bundle, network)
    declared = declared_layers(entry.config)
    if declared is not None and (stored := stored_layers(entry.config, shapes)) != declared:
        raise BadWeights(
            f"{what} is not what {MANIFEST} declares",
            got=f"tensors of {stored} layers",
            wanted=f"tensors of {declared} layers",
            do=REMAKE,
        )
    try:
        expected = expected_shapes(network, entry.config)
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:  # as torch likes
        raise BadWeights(
            f"{what} cannot be built as {MANIFEST} declares it", got=error, do=REMAKE
        ) from error
    require_shapes(
        what,
        {name: shape for name, shape in shapes.items() if name.startswith(prefix)},
        {name: shape for name, shape in expected.items() if name.startswith(prefix)},
        do=REMAKE,
    )
    return entry.files


def load_tensors(
    bundle: Bundle, network: Network, prefix: tuple[str, ...] = ("",)
) -> dict[str, torch.Tensor]:
    """Map the tensors of a network whose names start with one of `prefix`, of verified files.

    Files that `verify` has not hashed are hashed now, once per bundle. Pages are read when a tensor
    is first used. Names and shapes are exactly those of `pw_runtime.models.expected_shapes` for the
    config; dtypes are those of the checkpoint.

    Raises BadWeights when the bundle lacks the network, a shard is missing, damaged or altered, or
    a tensor is missing, unexpected, duplicated or of another shape.
    """
    if bundle.synthetic_tensors is not None:
        tensors = bundle.synthetic_tensors(network)
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    files = check_tensors(bundle, network, prefix)
    verify(bundle, files)
    loaded: dict[str, torch.Tensor] = {}
    for name in files:
        try:
            loaded |= bundle.opened[name].tensors(prefix)
        except UnreadableInput as error:
            raise _damaged(bundle.root / name, error) from error
    require_unchanged(bundle, network)
    return loaded


def require_unchanged(bundle: Bundle, network: Network) -> None:
    """Raise BadWeights where an opened shard of a network was overwritten since it was hashed."""
    for name in _entry(bundle, network).files:
        try:
            if name in bundle.opened:
                bundle.opened[name].require_unchanged()
        except UnreadableInput as error:
            raise _damaged(bundle.root / name, error) from error


def require_shapes(
    what: str,
    got: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    do: str,
) -> None:
    """Raise BadWeights unless both have the same names with the same shapes.

    Args:
        what: subject of the message, such as "the draft network of ...".
        got: shapes by tensor name.
        expected: the shapes that the config asks for.
        do: remedy for the message.
    """
    if missing := expected.keys() - got.keys():
        raise BadWeights(f"{what} lacks tensors", got=f"without {some_names(missing)}", do=do)
    if extra := got.keys() - expected.keys():
        raise BadWeights(f"{what} has unknown tensors", got=some_names(extra), do=do)
    for name, shape in expected.items():
        if got[name] != shape:
            raise BadWeights(
                f"{what} has a tensor of the wrong shape",
                got=f"{name} {list(got[name])}",
                wanted=f"{name} {list(shape)}",
                do=do,
            )


def _entry(bundle: Bundle, network: Network) -> Entry[Any]:
    entry = bundle.networks.get(network)
    if entry is None:
        raise BadWeights(
            f"{bundle.root} has no {network} network",
            got="a bundle converted without it",
            do="run `pw convert` again with the PixelWizard checkpoint as --highres",
        )
    return entry


def _stored_shapes(bundle: Bundle, network: Network) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a network by name, from its shards' headers."""
    if bundle.synthetic_tensors is not None:
        tensors = bundle.synthetic_tensors(network)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _entry(bundle, network).files:
        opened = _opened(bundle, name)
        shard = opened.shapes
        if other := [
            f"{x} of {dtype}" for x, dtype in opened.dtypes.items() if dtype not in FLOATS
        ]:
            raise BadWeights(
                f"{bundle.root / name} has tensors that are no weights",
                got=some_names(other),
                wanted=f"dtypes {', '.join(FLOATS)}",
                do=REMAKE,
            )
        if duplicates := shard.keys() & shapes.keys():
            raise BadWeights(
                f"{bundle.root / name} repeats tensors of another shard",
                got=some_names(duplicates),
                do=REMAKE,
            )
        shapes |= shard
    return shapes


def _opened(bundle: Bundle, name: str) -> TensorFile:
    """Return a shard, opened at the first call for it."""
    if name not in bundle.opened:
        try:
            bundle.opened[name] = TensorFile(bundle.root / name)
        except UnreadableInput as error:
            raise _damaged(bundle.root / name, error) from error
    return bundle.opened[name]


def _check_size(bundle: Bundle, name: str) -> None:
    path, record = bundle.root / name, bundle.files[name]
    try:
        if name in bundle.opened:
            size = bundle.opened[name].size
        else:
            with open_input(path) as file:
                size = os.fstat(file.fileno()).st_size
    except UnreadableInput as error:
        raise BadWeights(
            f"{path} is missing from the bundle",
            got=error,
            wanted=f"{record.bytes} bytes with SHA-256 {record.sha256}",
            do=REMAKE,
        ) from error
    if size != record.bytes:
        raise BadWeights(
            f"{path} has the wrong size",
            got=f"{size} bytes",
            wanted=f"{record.bytes} bytes with SHA-256 {record.sha256}",
            do=REMAKE,
        )


def _check_digest(bundle: Bundle, name: str) -> None:
    path = bundle.root / name
    try:
        digest = _opened(bundle, name).sha256 if name.endswith(SHARD) else sha256_of(path)
    except (OSError, UnreadableInput) as error:
        raise _damaged(path, error) from error
    _require_digest(bundle, name, digest)


def _require_digest(bundle: Bundle, name: str, digest: str) -> None:
    if digest != (wanted := bundle.files[name].sha256):
        raise BadWeights(
            f"{bundle.root / name} was altered or damaged",
            got=f"SHA-256 {digest}",
            wanted=f"SHA-256 {wanted}",
            do=REMAKE,
        )


def _damaged(path: Path, error: Exception) -> BadWeights:
    return BadWeights(
        f"{path} cannot be read", got=error, wanted="a complete safetensors file", do=REMAKE
    )


def _no_bundle(path: Path, error: UnreadableInput) -> BadWeights:
    marks = [mark for mark in _CHECKPOINT_MARKS if os.path.exists(path / mark)]
    if marks:
        return BadWeights(
            f"{path} is a published checkpoint, not a bundle",
            got=f"a folder with {marks[0]} and no {MANIFEST}",
            wanted="a bundle created by `pw convert`",
            do=f"run `pw convert --wan {path} --out BUNDLE` once, then use BUNDLE",
        )
    return BadWeights(
        f"there is no bundle at {path}",
        got=f"{MANIFEST}: {error}",
        wanted="a bundle created by `pw convert`",
        do="check the path, or run `pw convert --wan CHECKPOINT --out "
        f"{'BUNDLE' if os.path.lexists(path) else path}`",
    )
