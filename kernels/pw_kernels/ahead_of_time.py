# SPDX-License-Identifier: Apache-2.0
"""Triton and Gluon kernels compiled to cubins with no GPU present."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pw_kernels.launcher import Variant

SHARED_LIMITS: Mapping[int, int] = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
"""Bytes of shared memory one thread block may have, per architecture: those we compile for.

The compiler does not check it: a launch would fail.
"""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as a GPU of one architecture runs it, and what it takes."""

    name: str  # of the entry point in the cubin
    arch: int
    cubin: bytes
    ptx: str
    ttir: str  # Triton's own representation before any GPU is considered
    num_warps: int  # to launch with: more than asked for where warps are specialised
    shared_bytes: int  # dynamic shared memory of a block
    scratch_bytes: int  # global memory a block needs, for descriptors made on the GPU
    registers: int  # of a thread
    stack_bytes: int  # of a thread: what registers spill to, unless the kernel has local arrays

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory is within the limit of the architecture."""
        return self.shared_bytes <= SHARED_LIMITS[self.arch]

    def sass(self) -> str:
        """The disassembly."""
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
    maxnreg: int | None = None,
) -> Compiled:
    """Compile a `@triton.jit` or `@gluon.jit` function.

    Args:
        kernel: the decorated function, of a process without TRITON_INTERPRET.
        signature: argument -> "*bf16", "*fp32", "i32", "i64", "fp32", "tensordesc<...>", ...
        constants: the values of its `tl.constexpr` arguments.
        arch: 90 for sm_90a and so on; see SHARED_LIMITS.
        num_warps: warps of a block.
        num_stages: depth of software pipelines.
        divisible_by_16: arguments that are always multiples of 16 (a pointer: of 16 bytes);
            None for every pointer.
        maxnreg: a limit on the registers of a thread.

    Raises:
        ValueError: an architecture without a limit of shared memory in SHARED_LIMITS, arguments
            that are not the kernel's, or a kernel that Triton was told to interpret.
        RuntimeError: no Triton.
    """
    if arch not in SHARED_LIMITS:
        raise ValueError(f"kernels are compiled for arch {list(SHARED_LIMITS)}, got {arch}")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ModuleNotFoundError as error:
        raise RuntimeError("compiling kernels needs Triton: pip install 'triton==3.7.1'") from error
    source = _source(kernel, signature, constants, divisible_by_16)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
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
    )


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile what a launch would need. Raises what `compile_kernel` raises."""
    types = dict(variant.types)
    ones = {name: 1 for name, kind in types.items() if kind == "1"}
    return compile_kernel(
        importlib.import_module(f"pw_kernels._triton.{variant.kernel}").kernel,
        {name: kind.removesuffix(":16") for name, kind in types.items() if name not in ones},
        dict(variant.constants) | ones,
        arch=arch,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        divisible_by_16=[name for name, kind in types.items() if kind.endswith(":16")],
    )


def _source(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    divisible_by_16: Sequence[str] | None,
) -> Any:
    """The kernel with the types of its arguments, as triton.compile wants it."""
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
        raise ValueError(f"{name} wants arguments {names}, got {given}")
    if divisible_by_16 is None:
        divisible_by_16 = [n for n, kind in signature.items() if kind.startswith("*")]
    unknown = set(divisible_by_16) - set(signature)
    if unknown:
        raise ValueError(f"{name} wants divisible_by_16 among {list(signature)}, got {unknown}")
    make = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return make(
        kernel,
        {n: "constexpr" if n in constants else signature[n] for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in divisible_by_16},
    )


def _resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; without a driver only the cubin knows them."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump does not name the registers of {name}: {text}")
    return int(found[1]), int(found[2])


def _cuobjdump(option: str, cubin: bytes) -> str:
    """The answer of the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
