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
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from pw_runtime.errors import BadWeights
from pw_runtime.types import DitConfig, Network, TextEncoderConfig, VaeConfig

ConfigT = TypeVar("ConfigT", DitConfig, VaeConfig, TextEncoderConfig)

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer"

# Files that identify a folder as a published checkpoint.
_CHECKPOINT_MARKS = (
    "model_index.json",
    "config.json",
    "Wan2.2_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
_REMAKE = "copy the bundle again, or convert the checkpoint again with this version of `pw convert`"
_HASH_THREADS = 8
_MAX_NAMES = 8  # in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 hex digits) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[ConfigT]):
    """A network of a bundle."""

    config: ConfigT
    dtype: str  # dtypes of its tensors, joined by "+"
    files: tuple[str, ...]  # its shards in order, relative to the bundle, separated by "/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """The networks of a bundle."""

    draft: Entry[DitConfig]
    vae: Entry[VaeConfig]
    text_encoder: Entry[TextEncoderConfig]
    highres: Entry[DitConfig] | None = None

    def get(self, network: Network) -> Entry[Any] | None:
        """Return the entry of a network, or None if the bundle was converted without it."""
        entries: dict[Network, Entry[Any] | None] = {
            "draft": self.draft,
            "highres": self.highres,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
        }
        return entries[network]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of bundle.json. Unknown keys are errors, also nested ones."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    created_by: str
    source: dict[str, str]  # names of the files it was converted from
    networks: Networks
    files: dict[str, FileRecord]  # every file except bundle.json itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle.

    Attributes:
        root: its folder.
        digest: SHA-256 of bundle.json, which pins every other file.
        manifest: the content of bundle.json.
        synthetic_tensors: returns the tensors of a network, for benchmarks without weight files.
    """

    root: Path
    digest: str
    manifest: Manifest
    synthetic_tensors: Callable[[Network], dict[str, torch.Tensor]] | None = None

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


_MANIFEST = TypeAdapter(Manifest)


def manifest_json(manifest: Manifest) -> str:
    """Serialise a manifest as the text of bundle.json; equal manifests give equal texts."""
    return _MANIFEST.dump_json(manifest, indent=1).decode() + "\n"


def open_bundle(path: Path | str) -> Bundle:
    """Read and check bundle.json, but not the files that it lists (see `verify`).

    Raises BadWeights when `path` holds no bundle, or one of another format.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise _no_bundle(path, error) from error
    try:
        manifest = _MANIFEST.validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadWeights(
            f"{file} cannot be used",
            got=f"{where}: {first['msg']} ({error.error_count()} error(s))",
            wanted=f"a manifest of format {FORMAT}",
            do=_REMAKE,
        ) from error
    _check_paths(file, manifest)
    return Bundle(root=path, digest=hashlib.sha256(raw).hexdigest(), manifest=manifest)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(bundle: Bundle, names: Collection[str] | None = None) -> None:
    """Check sizes, then SHA-256 sums, of all files of the bundle or of those in `names`.

    Raises BadWeights naming the first file that differs from bundle.json.
    """
    files = [(bundle.root / name, record) for name, record in bundle.files.items()]
    if names is not None:
        files = [(bundle.root / name, bundle.files[name]) for name in names]
    for path, record in files:
        _check_size(path, record)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for check in [pool.submit(_check_digest, path, record) for path, record in files]:
            check.result()


def load_tensors(
    bundle: Bundle, network: Network, prefix: tuple[str, ...] = ("",)
) -> dict[str, torch.Tensor]:
    """Map the tensors of a network whose names start with one of `prefix` from disk.

    Pages are read when a tensor is first used. Names and shapes are exactly those of
    `pw_runtime.models.expected_shapes` for the config; dtypes are those of the checkpoint.

    Raises BadWeights when the bundle lacks the network, a shard is missing or damaged, or a
    tensor is missing, unexpected, duplicated or of another shape.
    """
    from pw_runtime.models import expected_shapes

    entry = bundle.networks.get(network)
    if entry is None:
        raise BadWeights(
            f"{bundle.root} has no {network} network",
            got="a bundle converted without it",
            do="run `pw convert` again with the PixelWizard checkpoint as --highres",
        )
    shapes = expected_shapes(network, entry.config)
    expected = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    tensors: dict[str, torch.Tensor] = {}
    if bundle.synthetic_tensors is not None:
        tensors = {
            name: tensor
            for name, tensor in bundle.synthetic_tensors(network).items()
            if name.startswith(prefix)
        }
    for file in entry.files:
        shard = _read_shard(bundle.root / file, prefix)
        if duplicates := shard.keys() & tensors.keys():
            raise BadWeights(
                f"{bundle.root / file} repeats tensors of another shard",
                got=some_names(duplicates),
                do=_REMAKE,
            )
        tensors |= shard
    require_shapes(
        f"the {network} network of {bundle.root}",
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        expected,
        do=_REMAKE,
    )
    return tensors


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


def some_names(names: Collection[str]) -> str:
    """List the first few names in order, and say how many there are if that is not all."""
    first = ", ".join(sorted(names)[:_MAX_NAMES])
    return f"{first}, ... ({len(names)} in all)" if len(names) > _MAX_NAMES else first


def _read_shard(path: Path, prefix: tuple[str, ...]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as shard:
            return {n: shard.get_tensor(n) for n in shard.keys() if n.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadWeights(
            f"{path} cannot be read",
            got=error,
            wanted="a complete safetensors file",
            do=_REMAKE,
        ) from error


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadWeights(
            f"{path} is missing from the bundle",
            got=error.strerror,
            wanted=f"{record.bytes} bytes with SHA-256 {record.sha256}",
            do=_REMAKE,
        ) from error
    if size != record.bytes or not path.is_file():
        raise BadWeights(
            f"{path} has the wrong size",
            got=f"{size} bytes",
            wanted=f"{record.bytes} bytes with SHA-256 {record.sha256}",
            do=_REMAKE,
        )


def _check_digest(path: Path, record: FileRecord) -> None:
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise BadWeights(f"{path} cannot be read", got=error, do=_REMAKE) from error
    if digest != record.sha256:
        raise BadWeights(
            f"{path} was altered or damaged",
            got=f"SHA-256 {digest}",
            wanted=f"SHA-256 {record.sha256}",
            do=_REMAKE,
        )


def _check_paths(file: Path, manifest: Manifest) -> None:
    entries = map(manifest.networks.get, get_args(Network))
    shards = {name for entry in entries if entry is not None for name in entry.files}
    unlisted = shards - manifest.files.keys()
    outside = {
        name
        for name in manifest.files
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    }
    if unlisted or outside:
        raise BadWeights(
            f"{file} names files that cannot be part of the bundle",
            got=some_names(unlisted | outside),
            wanted="shards listed under `files`, all inside the bundle",
            do=_REMAKE,
        )


def _no_bundle(path: Path, error: OSError) -> BadWeights:
    marks = [mark for mark in _CHECKPOINT_MARKS if (path / mark).exists()]
    if marks:
        return BadWeights(
            f"{path} is a published checkpoint, not a bundle",
            got=f"a folder with {marks[0]} and no {MANIFEST}",
            wanted="a bundle created by `pw convert`",
            do=f"run `pw convert --wan {path} --out BUNDLE` once, then use BUNDLE",
        )
    return BadWeights(
        f"there is no bundle at {path}",
        got=f"{MANIFEST}: {error.strerror}",
        wanted="a bundle created by `pw convert`",
        do=f"check the path, or run `pw convert --wan CHECKPOINT --out {path}`",
    )
