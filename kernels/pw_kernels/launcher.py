# SPDX-License-Identifier: Apache-2.0
"""How a kernel gets onto the GPU: out of the compiled library, else compiled by Triton now.

An operation says what it launches (`launch`): kernel, grid, arguments, constants. From these alone
follows the `Variant`, the one piece of machine code that serves the call; `recording` collects the
variants of calls with meta tensors, which is how the library knows what to hold. Nothing here
needs Triton until a kernel has to be compiled.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pw_kernels.library import library, status

POINTERS: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int64: "*i64",
}
Argument = Tensor | int | float
Launcher = Literal["library", "jit"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """`kernel` of `pw_kernels._triton.<name>`."""

    name: str
    # whole numbers of any value in one piece of machine code (do_not_specialize of triton.jit)
    any_number: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel: the types of its arguments and the values of its constants.

    A type is Triton's ("*bf16", "i32", "fp32"), with ":16" where the argument is a multiple of 16
    (a pointer: of 16 bytes), or "1" for a whole number of one, which becomes a constant.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]  # argument -> type, in order
    constants: tuple[tuple[str, Any], ...]
    num_warps: int  # asked for
    num_stages: int

    @property
    def key(self) -> str:
        """Name of this variant, equal in the process that compiles it and in the one that asks."""
        types = ",".join(kind for _, kind in self.types)
        constants = ",".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({types})[{constants}]w{self.num_warps}s{self.num_stages}"


@dataclass(frozen=True, slots=True)
class _Recorder:
    capability: tuple[int, int]
    variants: dict[str, Variant]


_recorder: _Recorder | None = None
tally: Counter[tuple[str, Launcher]] = Counter()
"""How often each kernel was launched out of the library and by Triton, in this process."""


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[dict[str, Variant]]:
    """Collect what the block would launch on a GPU of this compute capability; launch nothing.

    Yields the variants by their keys.
    """
    global _recorder
    assert _recorder is None, "recording inside recording"
    _recorder = _Recorder(capability, {})
    try:
        yield _recorder.variants
    finally:
        _recorder = None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`, or of the GPU that is recorded for.

    A CPU, where kernels are interpreted, counts as 8.0: the interpreter runs the portable ones.
    """
    if _recorder:
        return _recorder.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors `device` has; what is recorded does not depend on it."""
    return 1 if _recorder else torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The smallest power of two of at least n."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    arguments: Mapping[str, Argument],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int = 3,
) -> None:
    """Run a kernel on the device of its tensors, on the current stream.

    Args:
        kernel: what to run.
        grid: programs along up to three axes.
        arguments: tensors and numbers by the names of the kernel's arguments, in their order.
        constants: the values of its `tl.constexpr` arguments.
        num_warps: warps of a program.
        num_stages: depth of software pipelines.

    Raises:
        RuntimeError: neither the library nor Triton can provide the kernel.
    """
    variant = Variant(
        kernel.name,
        tuple((name, _type(value, name in kernel.any_number)) for name, value in arguments.items()),
        tuple(constants.items()),
        num_warps,
        num_stages,
    )
    if _recorder is not None:
        _recorder.variants[variant.key] = variant
        return
    one = next(x for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device_of(one):  # a launch goes to the current device, whatever holds tensors
        held = library() if one.is_cuda else None
        compiled = held.find(variant, capability(one.device)) if held else None
        if held and compiled:
            held.launch(compiled, grid, variant, arguments)
        else:
            _jit(variant, grid, arguments)
    tally[kernel.name, "library" if compiled else "jit"] += 1


def _type(value: Argument, any_number: bool) -> str:
    """The type of one argument as Triton would specialise it."""
    if isinstance(value, Tensor):
        aligned = value.is_meta or value.data_ptr() % 16 == 0
        return POINTERS[value.dtype] + (":16" if aligned else "")
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not any_number:
        return "1"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind + (":16" if value % 16 == 0 and not any_number else "")


def _jit(variant: Variant, grid: tuple[int, ...], arguments: Mapping[str, Argument]) -> None:
    """Let Triton compile the kernel, or take it from its cache, and launch it."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"no machine code for {variant.key} and no Triton to compile it ({status()}): "
            "pip install 'triton==3.7.1', or use --kernels reference"
        ) from error
    triton.set_allocator(_scratch)
    body = importlib.import_module(f"pw_kernels._triton.{variant.kernel}").kernel
    body[grid](
        **arguments,
        **dict(variant.constants),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where kernels on the current GPU keep descriptors that they make; alignment is below 512."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
