# SPDX-License-Identifier: Apache-2.0
"""A safetensors file, opened once: its header, its digest and its tensors are of one file."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pw_runtime.system.input_files import UnreadableInput, open_input, parse_json

if TYPE_CHECKING:
    from torch import Tensor

DIGESTS: Final = "sha256"  # metadata: JSON, the `digest_of` of every tensor by name
_BLOCK: Final = 2**18  # bytes read at a time


def digest_of(x: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes, 64 hex digits."""
    import torch

    digest = hashlib.sha256(f"{x.dtype} {list(x.shape)}\n".encode())
    digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorFile:
    """An open safetensors file. Every member raises UnreadableInput.

    A file that takes its name later is not seen. A program that overwrites this very file in place
    changes tensors that are still mapped: `require_unchanged` says so when it is called.

    Attributes:
        metadata: its texts by name.
        shapes: the shape of every tensor, from the header alone.
        dtypes: its dtype as safetensors names it, such as "BF16".
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with open_input(path) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        # By its descriptor, not its name, which may be another file's by now.
        self._name = f"/dev/fd/{self._descriptor}"
        self._opened = self._state()
        try:
            with safe_open(self._name, framework="pt") as file:
                self.metadata: Mapping[str, str] = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
                self.dtypes = {name: str(x.get_dtype()) for name, x in slices.items()}
        except Exception as error:  # of any class, where the header is damaged
            raise UnreadableInput(f"no complete safetensors file: {error}") from error

    def tensors(self, prefix: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """Map the tensors whose names start with one of `prefix`; pages are read on first use."""
        from safetensors import safe_open

        names = [name for name in self.shapes if name.startswith(prefix)]
        try:
            with safe_open(self._name, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except Exception as error:  # of any class, for a dtype that torch does not know
            raise UnreadableInput(f"tensors that cannot be read: {error}") from error

    def altered(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of tensors that are not as the digests of the metadata, if any, say."""
        try:
            digests = parse_json(self.metadata.get(DIGESTS, "{}"))
        except UnreadableInput:
            return []  # another program's use of the name
        if not isinstance(digests, dict):
            return []
        return [
            name for name, x in tensors.items() if digests.get(name) not in (None, digest_of(x))
        ]

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._opened[0]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, 64 hex digits, computed once.

        The file is read for it rather than mapped, which would count as memory of the process.
        """
        digest, offset = hashlib.sha256(), 0
        try:
            while block := os.pread(self._descriptor, _BLOCK, offset):
                digest.update(block)
                offset += len(block)
        except OSError as error:
            raise UnreadableInput(error.strerror or str(error)) from error
        self.require_unchanged()
        return digest.hexdigest()

    def require_unchanged(self) -> None:
        """Raise UnreadableInput where the file was written to since it was opened."""
        if self._state() != self._opened:
            raise UnreadableInput("a file that was written to while it was in use")

    def _state(self) -> tuple[int, int]:
        """Return the size in bytes, and the time of the last change of content in ns."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns
