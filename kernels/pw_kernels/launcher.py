# SPDX-License-Identifier: Apache-2.0
"""Launch a kernel: from the compiled library where it has it, else compiled by Triton on the spot.

An operation states what it launches: kernel, grid, arguments, constants (`launch`). These alone
determine the `Variant`, the one piece of machine code that serves the call; `recording` collects
the variants of calls on meta tensors, which is how the library is told what to contain. Nothing
here needs Triton until a kernel has to be compiled.
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
from pw_kernels.variant import (
    COMPILE_OPTIONS,
    INSTALL_TRITON,
    Argument,
    Kernel,
    Variant,
    variant_of,
)

Launcher = Literal["library", "jit"]


@dataclass(frozen=True, slots=True)
class _Recorder:
    capability: tuple[int, int]
    variants: dict[str, Variant]


_recorder: _Recorder | None = None
tally: Counter[tuple[str, Launcher]] = Counter()
"""Launches in this process, by kernel and by where its machine code came from."""


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[dict[str, Variant]]:
    """Collect what the block would launch on a GPU of this compute capability; launch nothing.

    Yields the variants by key, filled in as the block runs.
    """
    global _recorder
    assert _recorder is None, "recording inside recording"
    _recorder = _Recorder(capability, {})
    try:
        yield _recorder.variants
    finally:
        _recorder = None


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of `device`, or of the GPU being recorded for.

    A CPU counts as 8.0: Triton's interpreter runs the portable kernels.
    """
    if _recorder:
        return _recorder.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; recorded variants must not depend on it."""
    return 1 if _recorder else torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(n: int, block: int) -> int:
    """Return n / block, rounded up."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def row_block(dim: int) -> tuple[int, int]:
    """Return block size and number of warps for a program that holds one row of `dim` channels.

    A warp has 512 channels: 16 a thread, which is two 16-byte loads of a bf16 row.
    """
    block = next_power_of_2(dim)
    return block, min(16, max(1, block // 512))


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
        arguments: tensors and numbers by argument name, in the kernel's order.
        constants: values of its `tl.constexpr` arguments.
        num_warps: warps per program.
        num_stages: depth of software pipelines.

    Raises:
        RuntimeError: neither the library nor Triton can provide the kernel.
    """
    variant = variant_of(kernel, arguments, constants, num_warps, num_stages)
    if _recorder is not None:
        _recorder.variants[variant.key] = variant
        return
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device_of(tensor):  # a launch goes to the current device, not to its tensors'
        compiled_library = library() if tensor.is_cuda else None
        compiled = compiled_library and compiled_library.find(variant, capability(tensor.device))
        if compiled_library and compiled:
            compiled_library.launch(compiled, grid, variant, arguments)
        else:
            _jit(variant, grid, arguments)
    tally[kernel.name, "library" if compiled else "jit"] += 1


def _jit(variant: Variant, grid: tuple[int, ...], arguments: Mapping[str, Argument]) -> None:
    """Launch the kernel through Triton, which compiles it or finds it in its cache."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"no machine code for {variant.key} and no Triton to compile it ({status()}): "
            f"{INSTALL_TRITON}, or use --kernels reference"
        ) from error
    triton.set_allocator(_scratch)
    body = importlib.import_module(f"pw_kernels._triton.{variant.kernel}").kernel
    body[grid](
        **arguments,
        **dict(variant.constants),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        **COMPILE_OPTIONS,
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate memory for descriptors made by a kernel; PyTorch aligns to 512, which is enough."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
