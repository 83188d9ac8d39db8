# SPDX-License-Identifier: Apache-2.0
"""Find, check and call the compiled library of kernels (kernels/native).

It is built by `PW_BUILD_CUDA=1 pip install .`, or by plain cmake; PW_KERNELS_LIBRARY then names
the file. Without a library, or with one built from other sources, Triton compiles each kernel at
its first launch; `status` says which applies and why.
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

from pw_kernels.variant import COMPILE_OPTIONS, Argument, Variant

FORMAT = 2  # of the library's interface and manifest
ENVIRONMENT = "PW_KERNELS_LIBRARY"
REBUILD = "rebuild it: PW_BUILD_CUDA=1 pip install ."

# Compute capability -> architecture whose machine code it runs. Code for sm_80 runs on all of 8.x;
# the others, sm_90a and so on, run on no other capability.
ARCHS: Mapping[tuple[int, int], int] = {
    (8, 0): 80,
    (8, 6): 80,
    (8, 7): 80,
    (8, 9): 89,
    (9, 0): 90,
    (10, 0): 100,
    (10, 3): 103,
    (11, 0): 110,
    (12, 0): 120,
    (12, 1): 121,
}
# argument type without ":16" -> its C type, and its letter in pw_kernel.parameters
_C_TYPES: Mapping[str, tuple[type[Any], str]] = {
    "i32": (ctypes.c_int32, "i"),
    "i64": (ctypes.c_int64, "l"),
    "fp32": (ctypes.c_float, "f"),
}


class _Info(ctypes.Structure):
    """Mirror of pw_kernel in pw_kernels.h."""

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
    """One kernel of the library, and the resources it uses."""

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
    """An open library.

    Raises OSError for a file that cannot be loaded, ValueError for one that does not match these
    sources.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = _opened(path)
        self.manifest: dict[str, Any] = json.loads(self._c.pw_kernels_manifest())
        if self.manifest["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {self.manifest['format']}, expected {FORMAT}: {REBUILD}"
            )
        if self.manifest["sources"] != source_digest():
            raise ValueError(f"{path} was built from other kernel sources: {REBUILD}")
        self.kernels = {
            (kernel.key, kernel.arch): kernel
            for kernel in map(self._kernel, range(self._c.pw_kernels_count()))
        }

    def find(self, variant: Variant, gpu: tuple[int, int]) -> CompiledKernel | None:
        """Return the kernel for a GPU of this compute capability, None if the library has none."""
        return self.kernels.get((variant.key, ARCHS.get(gpu, 0)))

    def launch(
        self,
        kernel: CompiledKernel,
        grid: tuple[int, ...],
        variant: Variant,
        arguments: Mapping[str, Argument],
    ) -> None:
        """Launch on the current device and stream. Raises RuntimeError quoting the driver."""
        values, letters = _packed(variant, arguments)
        assert letters == kernel.parameters, f"{variant.key}: {letters} for {kernel.parameters}"
        scratch, address = None, 0
        if kernel.scratch_bytes:
            # Freed right after the launch: the allocator reuses it for later work of this stream.
            size = kernel.scratch_bytes * math.prod(grid)
            scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
            address = scratch.data_ptr()
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        blocks = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        message = ctypes.create_string_buffer(512)
        failed = self._c.pw_kernels_launch(
            kernel.index, stream, blocks, pointers, ctypes.c_ulonglong(address), message, 512
        )
        if failed:
            raise RuntimeError(
                f"{self.path.name}: {message.value.decode()}; its code is of "
                f"{self.toolchain(kernel.arch)}"
            )

    def driver(self) -> str | None:
        """Return why the library cannot use a GPU here; None if it can."""
        message = ctypes.create_string_buffer(512)
        failed = self._c.pw_kernels_driver(message, ctypes.c_size_t(512))
        return message.value.decode() if failed else None

    def toolchain(self, arch: int) -> str:
        """Describe what assembled the code of an architecture, and the driver that it needs."""
        tools = self.manifest["toolchains"][str(arch)]
        return (
            f"CUDA {tools['cuda']} (PTX {tools['ptx']}, ELF ABI {tools['elf_abi']}) and needs "
            f"driver {tools['driver']} or newer"
        )

    def table(self) -> str:
        """List what assembled the code of every architecture, and the resources of every kernel."""
        archs = sorted({kernel.arch for kernel in self.kernels.values()})
        lines = [f"sm_{arch:<5}{self.toolchain(arch)}" for arch in archs]
        lines += ["", f"{'arch':<8}{'warps':>5}{'regs':>6}{'stack':>7}{'shared':>8}  kernel"]
        for kernel in sorted(self.kernels.values(), key=lambda kernel: (kernel.key, kernel.arch)):
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
    """Return the library of this installation, or None; `status` says why.

    Raises RuntimeError where PW_KERNELS_LIBRARY names a file that cannot be used.
    """
    result = _find()
    return result if isinstance(result, Library) else None


def status() -> str:
    """Describe in one line where the machine code of kernels comes from."""
    result = _find()
    if isinstance(result, str):
        return f"compiled by Triton at the first launch: {result}"
    archs = " ".join(f"sm_{arch}" for arch in sorted({arch for _, arch in result.kernels}))
    return f"compiled library {result.path}: {len(result.kernels)} kernels for {archs}"


@cache
def _find() -> Library | str:
    """Open the library, or return why there is none."""
    override = os.environ.get(ENVIRONMENT)
    path = Path(override or str(files("pw_kernels") / "_native/libpw_kernels.so"))
    if not override and not path.exists():
        return "no compiled library in this installation"
    try:
        return Library(path)
    except (OSError, ValueError) as error:
        if override:
            raise RuntimeError(f"{ENVIRONMENT} names an unusable library: {error}") from error
        return str(error)


def source_digest() -> str:
    """Compute SHA-256 of the kernels' bodies and the options they are compiled with.

    With the types of arguments and the constants, these determine the machine code.
    """
    digest = hashlib.sha256(json.dumps(dict(COMPILE_OPTIONS), sort_keys=True).encode())
    bodies = Path(__file__).parent / "_triton"
    for path in sorted(bodies.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def letter(type_name: str) -> str:
    """Return the letter of an argument's type in pw_kernel.parameters; empty for a constant."""
    if type_name == "1":
        return ""
    return "p" if type_name.startswith("*") else _C_TYPES[type_name.removesuffix(":16")][1]


def _packed(variant: Variant, arguments: Mapping[str, Argument]) -> tuple[list[Any], str]:
    """Convert the arguments that are not constants to C values; return them and their letters."""
    values: list[Any] = []
    for name, type_name in variant.types:
        value = arguments[name]
        if type_name == "1":
            continue
        if isinstance(value, Tensor):
            values.append(ctypes.c_uint64(value.data_ptr()))
        else:
            values.append(_C_TYPES[type_name.removesuffix(":16")][0](value))
    return values, "".join(letter(type_name) for _, type_name in variant.types)


def _opened(path: Path) -> ctypes.CDLL:
    c = ctypes.CDLL(str(path))
    c.pw_kernels_manifest.restype = ctypes.c_char_p
    c.pw_kernels_get.restype = ctypes.POINTER(_Info)
    return c
