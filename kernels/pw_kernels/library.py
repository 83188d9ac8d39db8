# SPDX-License-Identifier: Apache-2.0
"""The compiled library of kernels (kernels/native): found, checked against the sources, called.

It is built by `PW_BUILD_CUDA=1 pip install .` and by plain cmake, where PW_KERNELS_LIBRARY names
the file. Without it, or with one made from other sources, Triton compiles each kernel when it is
first launched; `status` says which and why.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pw_kernels.variant import Argument, Variant

FORMAT = 1  # of the library's interface and manifest
ENVIRONMENT = "PW_KERNELS_LIBRARY"
REBUILD = "build it again: PW_BUILD_CUDA=1 pip install ."

# Compute capability -> architecture whose machine code it runs. Code for sm_80 runs on all of 8.x;
# that for sm_90a, 100a and 120a on nothing but its own.
ARCHS: Mapping[tuple[int, int], int] = {
    (8, 0): 80,
    (8, 6): 80,
    (8, 7): 80,
    (8, 9): 89,
    (9, 0): 90,
    (10, 0): 100,
    (12, 0): 120,
}
# Type of an argument without ":16" -> its C type, and its letter in pw_kernel.parameters.
_C_TYPES: Mapping[str, tuple[type[Any], str]] = {
    "i32": (ctypes.c_int32, "i"),
    "i64": (ctypes.c_int64, "l"),
    "fp32": (ctypes.c_float, "f"),
}


class _Info(ctypes.Structure):
    """pw_kernel of pw_kernels.h."""

    _fields_ = (
        ("key", ctypes.c_char_p),
        ("entry", ctypes.c_char_p),
        ("parameters", ctypes.c_char_p),
        ("arch", ctypes.c_int),
        ("num_warps", ctypes.c_int),
        ("registers", ctypes.c_int),
        ("stack_bytes", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("scratch_bytes", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel of the library, and what it takes."""

    index: int
    key: str
    parameters: str
    arch: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    scratch_bytes: int


class Library:
    """An opened library.

    Raises OSError for a file that cannot be loaded, ValueError for one that does not go with
    these sources.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = _opened(path)
        self.manifest: dict[str, Any] = json.loads(self._c.pw_kernels_manifest())
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"{path} has format {self.manifest['format']}, wanted {FORMAT}")
        if self.manifest["sources"] != source_digest():
            raise ValueError(f"{path} was made from other kernel sources: {REBUILD}")
        self.kernels = {
            (kernel.key, kernel.arch): kernel
            for kernel in map(self._kernel, range(self._c.pw_kernels_count()))
        }

    def find(self, variant: Variant, gpu: tuple[int, int]) -> CompiledKernel | None:
        """The kernel for a GPU of this compute capability."""
        return self.kernels.get((variant.key, ARCHS.get(gpu, 0)))

    def launch(
        self,
        kernel: CompiledKernel,
        grid: tuple[int, ...],
        variant: Variant,
        arguments: Mapping[str, Argument],
    ) -> None:
        """Launch on the current device and stream. Raises RuntimeError with the driver's words."""
        values, letters = _packed(variant, arguments)
        assert letters == kernel.parameters, f"{variant.key}: {letters} for {kernel.parameters}"
        scratch, address = None, 0
        if kernel.scratch_bytes:
            # Let go right after the launch: the allocator gives it to later work of the stream.
            size = kernel.scratch_bytes * math.prod(grid)
            scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
            address = scratch.data_ptr()
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(one) for one in values))
        blocks = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        message = ctypes.create_string_buffer(512)
        failed = self._c.pw_kernels_launch(
            kernel.index, stream, blocks, pointers, ctypes.c_ulonglong(address), message, 512
        )
        if failed:
            raise RuntimeError(f"{self.path.name}: {message.value.decode()}")

    def driver(self) -> str | None:
        """Why the library cannot use a GPU here; None where it can."""
        message = ctypes.create_string_buffer(512)
        failed = self._c.pw_kernels_driver(message, ctypes.c_size_t(512))
        return message.value.decode() if failed else None

    def table(self) -> str:
        """Registers, stack and shared memory of every kernel."""
        head = f"{'arch':<8}{'warps':>5}{'regs':>6}{'stack':>7}{'shared':>8}  kernel"
        lines = [head]
        for kernel in sorted(self.kernels.values(), key=lambda one: (one.key, one.arch)):
            lines.append(
                f"sm_{kernel.arch:<5}{kernel.num_warps:>5}{kernel.registers:>6}"
                f"{kernel.stack_bytes:>7}{kernel.shared_bytes:>8}  {kernel.key}"
            )
        return "\n".join(lines)

    def _kernel(self, index: int) -> CompiledKernel:
        info = self._c.pw_kernels_get(index).contents
        numbers = {name: getattr(info, name) for name, _ in _Info._fields_[3:]}
        return CompiledKernel(index, info.key.decode(), info.parameters.decode(), **numbers)


@cache
def library() -> Library | None:
    """The library of this installation, None where `status` says why not.

    Raises RuntimeError where PW_KERNELS_LIBRARY names a file that cannot be used.
    """
    found = _find()
    return found if isinstance(found, Library) else None


def status() -> str:
    """What kernels are launched from, in one line."""
    found = _find()
    if isinstance(found, str):
        return f"compiled by Triton when first launched: {found}"
    archs = " ".join(f"sm_{arch}" for arch in sorted({arch for _, arch in found.kernels}))
    return f"compiled library {found.path}: {len(found.kernels)} kernels for {archs}"


@cache
def _find() -> Library | str:
    """The library, or why there is none."""
    named = os.environ.get(ENVIRONMENT)
    path = Path(named) if named else Path(str(files("pw_kernels") / "_native/libpw_kernels.so"))
    if not named and not path.exists():
        return "no compiled library in this installation"
    try:
        return Library(path)
    except (OSError, ValueError) as error:
        if named:
            raise RuntimeError(f"{ENVIRONMENT} names an unusable library: {error}") from error
        return str(error)


def source_digest() -> str:
    """SHA-256 of the kernels' bodies: machine code follows from them, types and constants."""
    digest = hashlib.sha256()
    bodies = Path(__file__).parent / "_triton"
    for path in sorted(bodies.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def letter(kind: str) -> str:
    """The letter of an argument's type in pw_kernel.parameters; none for what is a constant."""
    if kind == "1":
        return ""
    return "p" if kind.startswith("*") else _C_TYPES[kind.removesuffix(":16")][1]


def _packed(variant: Variant, arguments: Mapping[str, Argument]) -> tuple[list[Any], str]:
    """C values of the arguments that are not constants, and their letters."""
    values: list[Any] = []
    for name, kind in variant.types:
        value = arguments[name]
        if kind == "1":
            continue
        if isinstance(value, Tensor):
            values.append(ctypes.c_uint64(value.data_ptr()))
        else:
            values.append(_C_TYPES[kind.removesuffix(":16")][0](value))
    return values, "".join(letter(kind) for _, kind in variant.types)


def _opened(path: Path) -> ctypes.CDLL:
    c = ctypes.CDLL(str(path))
    c.pw_kernels_manifest.restype = ctypes.c_char_p
    c.pw_kernels_get.restype = ctypes.POINTER(_Info)
    return c
