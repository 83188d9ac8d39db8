# SPDX-License-Identifier: Apache-2.0
"""Compile Triton and Gluon kernels to cubins, with no GPU present."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pw_kernels.variant import COMPILE_OPTIONS, INSTALL_TRITON, Variant

SHARED_LIMITS: Mapping[int, int] = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    110: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
"""Shared memory of a thread block, in bytes, for each architecture that we compile for.

The compiler does not check it: a launch would fail.
"""

FIRST_CUDA: Mapping[int, tuple[int, int]] = {103: (12, 9), 110: (13, 0), 121: (12, 9)}
"""First CUDA release whose assembler knows an architecture, where a Triton that we take may bring
an older one (3.6 has 12.8 and 12.9)."""

DRIVERS: Mapping[int, int] = {12: 525, 13: 580}
"""Oldest driver branch that runs machine code of a major CUDA release (NVIDIA's minor version
compatibility)."""

_ABI_VERSION = 8  # byte of an ELF header


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The tools behind the machine code of an architecture, which determine its drivers."""

    cuda: str  # release of ptxas, "13.4"
    ptx: str  # version of the PTX it was given, "9.4"
    elf_abi: int  # of the cubin

    @property
    def driver(self) -> int:
        """Oldest driver branch that loads the code: 580 for CUDA 13."""
        return DRIVERS[int(self.cuda.split(".")[0])]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel compiled for one architecture, and the resources it uses."""

    name: str  # of the entry point in the cubin
    arch: int
    cubin: bytes
    ptx: str
    ttir: str  # Triton's own representation before any GPU is considered
    num_warps: int  # to launch with: more than requested where warps are specialised
    shared_bytes: int  # dynamic shared memory per block
    scratch_bytes: int  # global memory per block, for descriptors made on the GPU
    registers: int  # per thread
    stack_bytes: int  # per thread: spilled registers, unless the kernel has local arrays
    toolchain: Toolchain

    @property
    def fits(self) -> bool:
        """True if a block's shared memory is within the limit of the architecture."""
        return self.shared_bytes <= SHARED_LIMITS[self.arch]

    def sass(self) -> str:
        """Return the disassembly."""
        return _cuobjdump("--dump-sass", self.cubin)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible_by_16: Sequence[str] | None = None,
) -> Compiled:
    """Compile a `@triton.jit` or `@gluon.jit` function.

    Args:
        kernel: the decorated function, in a process without TRITON_INTERPRET.
        signature: argument -> "*bf16", "*fp32", "i32", "i64", "fp32", "tensordesc<...>", ...
        constants: values of its `tl.constexpr` arguments.
        arch: 90 for sm_90a and so on; see SHARED_LIMITS.
        num_warps: warps per block.
        num_stages: depth of software pipelines.
        divisible_by_16: arguments that are always multiples of 16 (a pointer: of 16 bytes);
            None: every pointer.

    Raises:
        ValueError: an architecture that is not in SHARED_LIMITS, arguments that are not the
            kernel's, or a kernel that Triton was told to interpret.
        RuntimeError: no Triton, or one whose assembler does not know the architecture.
    """
    cuda = assembler(arch)
    import triton
    from triton.backends.compiler import GPUTarget

    source = _source(kernel, signature, constants, divisible_by_16)
    options = {"num_warps": num_warps, "num_stages": num_stages, **COMPILE_OPTIONS}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(built.asm["cubin"], built.metadata.name)
    return Compiled(
        name=built.metadata.name,
        arch=arch,
        cubin=built.asm["cubin"],
        ptx=built.asm["ptx"],
        ttir=str(built.asm.get("ttir", "")),
        num_warps=built.metadata.num_warps,
        shared_bytes=built.metadata.shared,
        scratch_bytes=built.metadata.global_scratch_size,
        registers=registers,
        stack_bytes=stack,
        toolchain=Toolchain(cuda, _ptx_version(built.asm["ptx"]), built.asm["cubin"][_ABI_VERSION]),
    )


def assembler(arch: int) -> str:
    """Return the CUDA release of the ptxas that compiles for `arch`, such as "13.1".

    Raises:
        ValueError: an architecture that is not in SHARED_LIMITS.
        RuntimeError: no Triton, or one whose assembler does not know the architecture.
    """
    if arch not in SHARED_LIMITS:
        raise ValueError(f"kernels compile for the architectures {[*SHARED_LIMITS]}, got {arch}")
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas
    except ModuleNotFoundError as error:
        raise RuntimeError(f"compiling kernels needs Triton: {INSTALL_TRITON}") from error
    cuda: str = get_ptxas(arch).version
    first = FIRST_CUDA.get(arch, (0, 0))
    if tuple(map(int, cuda.split(".")[:2])) < first:
        raise RuntimeError(
            f"sm_{arch}a needs the assembler of CUDA {first[0]}.{first[1]} or newer, got {cuda} of "
            f"Triton {triton.__version__}: install a newer Triton, or leave {arch} out"
        )
    return cuda


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile what a launch would need. Raises what `compile_kernel` raises."""
    types = dict(variant.types)
    ones = {name: 1 for name, type_name in types.items() if type_name == "1"}
    return compile_kernel(
        importlib.import_module(f"pw_kernels._triton.{variant.kernel}").kernel,
        {name: types[name].removesuffix(":16") for name in types if name not in ones},
        dict(variant.constants) | ones,
        arch=arch,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        divisible_by_16=[name for name in types if types[name].endswith(":16")],
    )


def _source(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    divisible_by_16: Sequence[str] | None,
) -> Any:
    """Return the kernel with the types of its arguments, as triton.compile expects it."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
    from triton.runtime.jit import JITFunction

    name = getattr(kernel, "__name__", repr(kernel))
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            f"{name} is not a compiled Triton function but {type(kernel).__name__}: "
            "decorate it with @triton.jit and unset TRITON_INTERPRET before triton is imported"
        )
    names = kernel.arg_names
    given = sorted([*signature, *constants])
    if given != sorted(names):
        raise ValueError(f"{name} expects arguments {names}, got {given}")
    if divisible_by_16 is None:
        divisible_by_16 = [n for n, type_name in signature.items() if type_name.startswith("*")]
    unknown = set(divisible_by_16) - set(signature)
    if unknown:
        raise ValueError(f"{name} expects divisible_by_16 among {list(signature)}, got {unknown}")
    make = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return make(
        kernel,
        {n: "constexpr" if n in constants else signature[n] for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in divisible_by_16},
    )


def _resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Read registers and stack bytes per thread from the cubin; nothing else has them here."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    match = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump does not list the registers of {name}: {text}")
    return int(match[1]), int(match[2])


def _ptx_version(ptx: str) -> str:
    match = re.search(r"^\.version (\d+\.\d+)$", ptx, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"PTX without a version: {ptx[:200]}")
    return match[1]


def _cuobjdump(option: str, cubin: bytes) -> str:
    """Run the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
