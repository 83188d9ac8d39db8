# SPDX-License-Identifier: Apache-2.0
"""Make Triton's interpreter exact for bf16 and fp8.

The stock interpreter (TRITON_INTERPRET=1) stores bf16 and fp8 as bits in unsigned integers. It
truncates where a GPU rounds to nearest even, and it adds, compares and multiplies the bits as
integers, without an error. `install_exact_casts` fixes that: narrow floats are widened to fp32
for every operation and rounded once afterwards, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pw_kernels.variant import INSTALL_TRITON

TESTED = ("3.6", "3.7", "3.8", "3.9")

_ARITHMETIC = (
    "create_fadd",
    "create_fsub",
    "create_fmul",
    "create_fdiv",
    "create_frem",
    "create_precise_divf",
    "create_fma",
    "create_clampf",
    "create_minimumf",
    "create_minnumf",
    "create_maximumf",
    "create_maxnumf",
)
_COMPARISONS = tuple(
    f"create_fcmp{order}{relation}"
    for order in "OU"
    for relation in ("LT", "GT", "LE", "GE", "EQ", "NE")
)
_REPLACED = ("cast_impl", "create_fp_to_fp", "create_dot", *_ARITHMETIC, *_COMPARISONS)


def install_exact_casts() -> None:
    """Make Triton's interpreter round and compute bf16 and fp8 as a GPU does.

    Call it once before the first kernel runs; further calls change nothing.

    Raises:
        RuntimeError: Triton is not interpreting, or is a version this was not tested with.
    """
    try:
        import triton.runtime.interpreter as stock
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the Triton interpreter needs Triton: {INSTALL_TRITON}") from error
    builder = stock.InterpreterBuilder
    if getattr(builder, "pw_exact", False):
        return
    _check(stock)
    narrow = _NarrowFloats(stock)
    builder.cast_impl = narrow.cast
    builder.create_fp_to_fp = narrow.convert
    builder.create_dot = narrow.dot(builder.create_dot)
    for name in _ARITHMETIC:
        setattr(builder, name, narrow.arithmetic(getattr(builder, name)))
    for name in _COMPARISONS:
        setattr(builder, name, narrow.comparison(getattr(builder, name)))
    stock.ReduceOps.sum = narrow.refuse(stock.ReduceOps.sum, "tl.sum")
    stock.ScanOps.cumsum = narrow.refuse(stock.ScanOps.cumsum, "tl.cumsum")
    builder.create_atomic_rmw = narrow.refuse(builder.create_atomic_rmw, "an atomic")
    builder.pw_exact = True


def _check(stock: Any) -> None:
    """Raise RuntimeError unless the names that this file replaces can be relied on."""
    import triton

    if triton.__version__.rpartition(".")[0] not in TESTED:
        raise RuntimeError(
            f"exact casts replace private names of Triton {', '.join(TESTED)}, "
            f"got {triton.__version__}: {INSTALL_TRITON}"
        )
    missing = [name for name in _REPLACED if not hasattr(stock.InterpreterBuilder, name)]
    if missing:
        raise RuntimeError(f"Triton {triton.__version__}'s interpreter has no {missing}")
    if not isinstance(triton.language.cdiv, stock.InterpretedFunction):
        raise RuntimeError(
            "Triton was imported to compile, not to interpret: "
            "set TRITON_INTERPRET=1 before anything imports triton"
        )


class _NarrowFloats:
    """Replacements for methods of InterpreterBuilder; a `handle` holds bits and a type."""

    def __init__(self, stock: Any) -> None:
        import torch
        import triton.language as tl

        self.handle_type = stock.TensorHandle
        self.stock_convert = stock._convert_float
        self.numpy_dtype = stock._get_np_dtype
        self.truncate = stock._ir.ROUNDING_MODE.RTZ
        self.float32, self.float64, self.boolean = tl.float32, tl.float64, tl.int1
        self.unknown = tl.float8e4b15  # torch has no such type
        self.torch_dtype = {
            tl.bfloat16: torch.bfloat16,
            tl.float8e4nv: torch.float8_e4m3fn,
            tl.float8e5: torch.float8_e5m2,
            tl.float8e4b8: torch.float8_e4m3fnuz,
            tl.float8e5b16: torch.float8_e5m2fnuz,
        }
        self.fp8 = set(self.torch_dtype) - {tl.bfloat16}

    def is_narrow(self, dtype: Any) -> bool:
        """Return True for types that the interpreter stores as integers."""
        return dtype.scalar in self.torch_dtype

    def widen(self, handle: Any) -> Any:
        """Convert a narrow float to fp32, exactly; return anything else unchanged."""
        import torch

        if not self.is_narrow(handle.dtype):
            return handle
        bits = torch.from_numpy(handle.data.copy())
        values = bits.view(self.torch_dtype[handle.dtype.scalar]).float().numpy()
        return self.handle_type(values.reshape(handle.data.shape), self.float32)

    def narrow(self, values: Any, dtype: Any) -> Any:
        """Convert an array to bits of the narrow `dtype`, rounded to nearest even.

        fp8 saturates at its largest finite number, as PTX's cvt.satfinite does.
        """
        import torch

        target = self.torch_dtype[dtype]
        wide = torch.from_numpy(values.astype("float32"))
        if dtype in self.fp8:
            limit = torch.finfo(target).max
            wide = wide.clamp(-limit, limit)
        integer = torch.uint8 if target.itemsize == 1 else torch.uint16
        bits = wide.to(target).view(integer).numpy().reshape(values.shape)
        return self.handle_type(bits, dtype)

    def cast(self, src: Any, dst_type: Any) -> Any:
        """Replace cast_impl: any number to any number."""
        src, dst = self.widen(src), dst_type.scalar
        if self.is_narrow(dst):
            return self.narrow(src.data, dst)
        return self.handle_type(src.data.astype(self.numpy_dtype(dst_type)), dst)

    def convert(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Replace create_fp_to_fp: float to float where one is fp8, or with truncation."""
        src_dtype, dst = src.dtype.scalar, dst_type.scalar
        if rounding_mode == self.truncate or self.unknown in (src_dtype, dst):
            data = self.stock_convert(src.data, src_dtype, dst, rounding_mode)
            return self.handle_type(data.view(self.numpy_dtype(dst_type)), dst)
        return self.cast(src, dst_type)

    def dot(self, stock_dot: Callable[..., Any]) -> Callable[..., Any]:
        """Replace create_dot: floats are multiplied in fp32."""
        import torch

        def create_dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
            if not (a.dtype.is_floating() and b.dtype.is_floating()) or a.dtype == self.float64:
                return stock_dot(builder, a, b, d, precision, imprecise)
            left, right = (
                torch.from_numpy(self.widen(side).data.astype("float32")) for side in (a, b)
            )
            total = torch.matmul(left, right).numpy() + d.data
            return self.handle_type(total.astype(d.data.dtype), d.dtype.scalar)

        return create_dot

    def arithmetic(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a float operation, computing it in fp32 where its operands are narrow."""

        def create(builder: Any, *operands: Any) -> Any:
            dtype = operands[0].dtype.scalar
            if not self.is_narrow(dtype):
                return stock(builder, *operands)
            # the flags of clampf and fma are not handles and pass through
            wide = [self.widen(o) if hasattr(o, "dtype") else o for o in operands]
            return self.narrow(stock(builder, *wide).data, dtype)

        return create

    def comparison(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a float comparison, computing it in fp32 where its operands are narrow."""

        def create(builder: Any, left: Any, right: Any) -> Any:
            if not self.is_narrow(left.dtype):
                return stock(builder, left, right)
            return self.handle_type(
                stock(builder, self.widen(left), self.widen(right)).data, self.boolean
            )

        return create

    def refuse(self, stock: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap an operation to raise where it would add the bits of narrow floats."""

        def create(owner: Any, *operands: Any) -> Any:
            for operand in operands:
                if hasattr(operand, "dtype") and self.is_narrow(operand.dtype):
                    raise ValueError(f"{name} expects fp32 when interpreted, got {operand.dtype}")
            return stock(owner, *operands)

        return create
