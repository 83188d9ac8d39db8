# SPDX-License-Identifier: Apache-2.0
"""Nouns of a launch: the kernel, its arguments, the piece of machine code that serves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POINTERS: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
Argument = Tensor | int | float

# Options of every compilation, at a launch and ahead of time. why: Triton 3.10 turns fusion of
# multiplications and additions off by default, and results would change unnoticed.
COMPILE_OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}

INSTALL_TRITON = 'pip install "pixelwizard-runtime[cuda]"'


@dataclass(frozen=True, slots=True)
class Kernel:
    """`kernel` of `pw_kernels._triton.<name>`."""

    name: str
    # integers whose value is not compiled in, as given to triton.jit
    do_not_specialize: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel: the types of its arguments and the values of its constants.

    A type is Triton's ("*bf16", "i32", "fp32"), with ":16" where the argument is a multiple of 16
    (for a pointer: of 16 bytes), or "1" for an integer equal to one, which becomes a constant.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]  # argument -> type, in order
    constants: tuple[tuple[str, Any], ...]
    num_warps: int  # as requested
    num_stages: int

    @property
    def key(self) -> str:
        """Name of this variant, equal in the process that compiles it and where it is looked up."""
        types = ",".join(type_name for _, type_name in self.types)
        constants = ",".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({types})[{constants}]w{self.num_warps}s{self.num_stages}"


def variant_of(
    kernel: Kernel,
    arguments: Mapping[str, Argument],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
) -> Variant:
    """Return the variant that a launch with these arguments needs."""
    types = (
        (name, argument_type(value, specialize=name not in kernel.do_not_specialize))
        for name, value in arguments.items()
    )
    return Variant(kernel.name, tuple(types), tuple(constants.items()), num_warps, num_stages)


def argument_type(value: Argument, *, specialize: bool) -> str:
    """Return the type of one argument as Triton would specialise it."""
    if isinstance(value, Tensor):
        aligned = value.is_meta or value.data_ptr() % 16 == 0
        return POINTERS[value.dtype] + (":16" if aligned else "")
    if isinstance(value, float):
        return "fp32"
    if value == 1 and specialize:
        return "1"
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    return width + (":16" if value % 16 == 0 and specialize else "")
