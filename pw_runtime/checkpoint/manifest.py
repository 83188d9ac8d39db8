# SPDX-License-Identifier: Apache-2.0
"""The content of bundle.json: its nouns, reading and writing it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pw_runtime.checkpoint.limits import problems_of
from pw_runtime.errors import BadWeights
from pw_runtime.types import DitConfig, Network, TextEncoderConfig, VaeConfig

ConfigT = TypeVar("ConfigT", DitConfig, VaeConfig, TextEncoderConfig)

FORMAT = 1
MANIFEST = "bundle.json"
REMAKE = (
    "copy the bundle again, or convert the checkpoint again with this version of `pw convert`; of "
    "one in the cache remove the folder and run the same command again"
)
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


_MANIFEST = TypeAdapter(Manifest)


def manifest_json(manifest: Manifest) -> str:
    """Serialise a manifest as the text of bundle.json; equal manifests give equal texts."""
    return _MANIFEST.dump_json(manifest, indent=1).decode() + "\n"


def parse_manifest(raw: bytes, file: Path) -> Manifest:
    """Read and check the text of a bundle.json. Raises BadWeights naming what cannot be."""
    try:
        manifest = _MANIFEST.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise unusable(file, f"{where}: {first['msg']} ({error.error_count()} error(s))") from error
    _check_paths(file, manifest)
    if problems := problems_of(manifest):
        raise unusable(file, "; ".join(problems[:_MAX_NAMES]))
    return manifest


def unusable(file: Path, got: str) -> BadWeights:
    """Return the error that a bundle.json cannot be used, and why."""
    return BadWeights(
        f"{file} cannot be used", got=got, wanted=f"a manifest of format {FORMAT}", do=REMAKE
    )


def some_names(names: Collection[str]) -> str:
    """List the first few names in order, and say how many there are if that is not all."""
    first = ", ".join(sorted(names)[:_MAX_NAMES])
    return f"{first}, ... ({len(names)} in all)" if len(names) > _MAX_NAMES else first


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
            do=REMAKE,
        )
