# SPDX-License-Identifier: Apache-2.0
"""The specification of an engine, and the key of a stored one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

SMALLEST: Final = 2  # value of a named dimension: compilers treat 1 as broadcasting
Backend = Literal["eager", "aoti", "openvino", "tensorrt", "tensorrt-rtx"]
FrontEnd = Literal["onnx", "torch-tensorrt"]  # how a segment is passed to TensorRT
# What an engine depends on beside its spec, by name.
Platform = tuple[tuple[str, str], ...]
DType = Literal["fp32", "bf16", "fp16", "int64", "int8", "fp8", "fp4"]

DTYPES: Final[Mapping[DType, torch.dtype]] = MappingProxyType(
    {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "int64": torch.int64,
        "int8": torch.int8,
        "fp8": torch.float8_e4m3fn,
        "fp4": torch.float4_e2m1fn_x2,  # two numbers in an element
    }
)
_NAMES: Final[Mapping[torch.dtype, DType]] = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()}
)


def dtype_name(dtype: torch.dtype) -> DType:
    """Return "fp32" for torch.float32 and so on. Raises ValueError for other dtypes."""
    if dtype not in _NAMES:
        raise ValueError(f"engines take {', '.join(DTYPES)}, got {dtype}")
    return _NAMES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output. A dimension is a number, or the name of one that varies per call."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with its named dimensions filled in."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)

    def numbers(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the same shape as compilers have it: in numbers, of which fp4 packs two."""
        shape = self.sized(sizes)
        return (*shape[:-1], 2 * shape[-1]) if self.dtype == "fp4" else shape


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """A segment of a network with limits for its named dimensions.

    Where weights are inputs, one engine serves every block and every checkpoint of these shapes.
    """

    segment: str  # "block_in"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: tuple[tuple[str, int], ...]  # largest value of every named dimension
    sources: str  # digest of the code that defines the arithmetic
    numbers: tuple[tuple[str, float], ...] = ()  # scalar parameters that no shape reveals
    weights: str | None = None  # digest of the weights, if they are part of the engine

    def __post_init__(self) -> None:
        if "/" in self.segment:  # it becomes part of a folder's name, and folders are replaced
            raise ValueError(f"expected a segment's name, got the path {self.segment!r}")
        names = {dim for tensor in (*self.inputs, *self.outputs) for dim in tensor.shape}
        unknown = {dim for dim in names if isinstance(dim, str)} - dict(self.limits).keys()
        if unknown:
            raise ValueError(f"{self.segment} has no limit for {', '.join(sorted(unknown))}")

    def sizes(self, inputs: Sequence[Tensor], *, smallest: int = SMALLEST) -> dict[str, int]:
        """Check the inputs of a call; return the value of every named dimension.

        Raises ValueError naming the tensor, what was expected and what it got; also for a
        dimension below `smallest`.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{self.segment} takes {len(self.inputs)} tensors, got {len(inputs)}")
        sizes: dict[str, int] = {}
        limits = dict(self.limits)
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x.dtype != DTYPES[spec.dtype]:
                raise self._wrong(spec, spec.dtype, x.dtype)
            if x.dim() != len(spec.shape):
                raise self._wrong(spec, f"shape {spec.shape}", tuple(x.shape))
            for dim, size in zip(spec.shape, x.shape, strict=True):
                expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected:
                    raise self._wrong(spec, f"{dim} of {expected}", tuple(x.shape))
                if isinstance(dim, str) and not smallest <= size <= limits[dim]:
                    raise self._wrong(spec, f"{dim} from {smallest} to {limits[dim]}", size)
        return sizes

    def check_outputs(self, outputs: Sequence[Tensor], sizes: Mapping[str, int]) -> None:
        """Check the tensors to write into. Raises ValueError for another dtype or shape."""
        if len(outputs) != len(self.outputs):
            raise ValueError(
                f"{self.segment} returns {len(self.outputs)} tensors, got {len(outputs)} to fill"
            )
        for spec, x in zip(self.outputs, outputs, strict=True):
            shape = spec.sized(sizes)
            if x.dtype != DTYPES[spec.dtype]:
                raise self._wrong(spec, spec.dtype, x.dtype)
            if tuple(x.shape) != shape:
                raise self._wrong(spec, f"shape {shape}", tuple(x.shape))

    def _wrong(self, spec: TensorSpec, expected: object, got: object) -> ValueError:
        return ValueError(f"{self.segment}, tensor {spec.name}: expected {expected}, got {got}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """Everything that must match before a stored engine is used."""

    spec: EngineSpec
    backend: Backend
    platform: Platform  # versions and device, as the backend needs
    options: tuple[tuple[str, str], ...] = ()  # of the build, if they change the result

    @property
    def digest(self) -> str:
        """SHA-256 of all fields."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the engine's folder in the store."""
        return f"{self.spec.segment}-{self.backend}-{self.digest[:16]}"


def digest_of(texts: Iterable[bytes]) -> str:
    """Compute SHA-256 over byte strings in order, each with its length."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
