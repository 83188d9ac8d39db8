# SPDX-License-Identifier: Apache-2.0
"""Call the C++ of `_cpu`: 3x3 convolutions by Winograd's F(4x4, 3x3), and the norm over channels.

One file of machine code for the instructions that PyTorch uses here (AVX2 or AVX-512), compiled on
the machine that runs it: `pw_runtime.system.cpu_kernels` does that once. The threads are those of
PyTorch's own OpenMP: a second pool would compete with the one that spins while it waits.

The results depend on neither the instructions, the compiler, the number of threads, nor the length
of a chunk: every rounding is written down in the C++. Nothing is kept between calls: the filters
are transformed by each, which a dozen tiles make up for.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPU_OPERATIONS = ("causal_conv3d", "channel_norm")  # those that have "cpu"
SOURCES = Path(__file__).parent / "_cpu"
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mavx2", "-mfma")}
LEAST_TILES = 12
"""Tiles of all frames of a call, below which transforming the filters is not worth their while."""
_FILTER_BYTES = 14 * 2**20  # of the transformed filters of one block: they stay in an L3 cache


_Fields = Sequence[tuple[str, type[ctypes.c_void_p | ctypes.c_int64]]]


def _fields(pointers: tuple[str, ...], sizes: tuple[str, ...]) -> _Fields:
    """Return the fields of a structure of addresses, then 64-bit numbers."""
    return [(n, ctypes.c_void_p) for n in pointers] + [(n, ctypes.c_int64) for n in sizes]


class _Convolution(ctypes.Structure):
    """Mirror of pw_convolution in winograd.cpp."""

    _fields_ = _fields(
        ("x", "weight", "bias", "out", "workspace"),
        (
            "x_frame", "x_row", "x_column", "out_frame", "out_row", "out_column",
            "weight_filter", "weight_channel", "weight_tap", "weight_row", "weight_column",
            "channels", "filters", "taps", "frames", "rows", "columns", "x_rows", "pad",
            "block_tiles", "block_filters", "threads",
        ),
    )  # fmt: skip


class _Norm(ctypes.Structure):
    """Mirror of pw_norm in channel_norm.cpp."""

    _fields_ = _fields(
        ("x", "gamma", "out"),
        (
            "x_frame", "x_row", "x_column", "out_frame", "out_row", "out_column",
            "channels", "frames", "rows", "columns", "silu", "threads",
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Library:
    """An open library, and OpenMP's entry point of the one that PyTorch uses."""

    path: Path
    c: ctypes.CDLL
    parallel: ctypes.c_void_p


_library: Library | None = None


def unavailable() -> str | None:
    """Return why this CPU or this PyTorch cannot run the library; None if they can."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        return f"it needs AVX2 or AVX-512, PyTorch uses {capability}"
    try:
        _openmp()
    except (OSError, AttributeError):
        return "this PyTorch does not run its threads by OpenMP"
    return None


def file_name() -> str:
    """Return the name of the library's file: its instructions, and the digest of all it is made of.

    Raises KeyError where it is `unavailable`.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(repr((OPTIONS, INSTRUCTIONS[capability])).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return f"pw_cpu-{capability.lower()}-{digest.hexdigest()[:16]}.so"


def compile_command(compiler: str, out: Path) -> list[str]:
    """Return the command that compiles the library into the file `out`."""
    flags = INSTRUCTIONS[torch.backends.cpu.get_cpu_capability()]
    files = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    return [compiler, *OPTIONS, *flags, "-o", str(out), *files]


def open_library(path: Path) -> None:
    """Open a compiled library for this process. Raises OSError where it cannot be loaded."""
    global _library
    c = ctypes.CDLL(str(path))
    try:
        c.pw_winograd_workspace.restype = ctypes.c_int64
        found = (c.pw_winograd, c.pw_channel_norm)
    except AttributeError as error:
        raise OSError(f"{path} is not our library: {error}") from error
    assert found
    _library = Library(path, c, _openmp())


def library() -> Library:
    """Return the open library. Raises RuntimeError where none was opened."""
    if _library is None:
        raise RuntimeError("the CPU kernels were requested and are not open: open_library(path)")
    return _library


def convolvable(x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool) -> bool:
    """Tell whether `convolve` takes these arguments of `causal_conv3d`, and is worth its while.

    3x3 over rows and columns, fp32 with channels last, no gradients, LEAST_TILES or more.
    """
    if weight.shape[3:] != (3, 3) or not _all_plain(x, weight, bias):
        return False
    frames, rows = x.shape[2] - weight.shape[2] + 1, x.shape[3] - 2 * rows_given
    return _channels_last(x) and frames * _tiles(rows, x.shape[4]) >= LEAST_TILES


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool) -> Tensor:
    """Compute `causal_conv3d`; the result has channels last."""
    assert convolvable(x, weight, bias, rows_given)
    frames, rows = x.shape[2] - weight.shape[2] + 1, x.shape[3] - 2 * rows_given
    shape = (x.shape[0], weight.shape[0], frames, rows, x.shape[4])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    for source, result in zip(x, out, strict=True):
        _winograd(source, weight, bias, result, pad=0 if rows_given else 1)
    return out


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, pad: int) -> None:
    """Convolve x, [C, kt-1+T, H, W], with weight, [C', C, kt, 3, 3], into out, [C', T, H', W].

    Row r of out reads the rows r - pad to r - pad + 2 of x, zeros where there are none.
    """
    (channels, _, x_rows, columns), (filters, frames, rows, _) = x.shape, out.shape
    own, tiles, threads = library(), _tiles(rows, columns), torch.get_num_threads()
    block_tiles, block_filters = _blocks(channels, weight.shape[2], frames)
    if threads > 1:  # something to do for each of them, and the same bits
        block_tiles = max(4, min(block_tiles, tiles // (2 * threads)))
        threads = min(threads, -(-tiles // block_tiles))
    bias = None if bias is None else bias.contiguous()
    call = _Convolution(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        x_frame=x.stride(1),
        x_row=x.stride(2),
        x_column=x.stride(3),
        out_frame=out.stride(1),
        out_row=out.stride(2),
        out_column=out.stride(3),
        weight_filter=weight.stride(0),
        weight_channel=weight.stride(1),
        weight_tap=weight.stride(2),
        weight_row=weight.stride(3),
        weight_column=weight.stride(4),
        channels=channels,
        filters=filters,
        taps=weight.shape[2],
        frames=frames,
        rows=rows,
        columns=columns,
        x_rows=x_rows,
        pad=pad,
        block_tiles=block_tiles,
        block_filters=block_filters,
        threads=threads,
    )
    size = own.c.pw_winograd_workspace(ctypes.byref(call))
    workspace = torch.empty(size, dtype=torch.float32, device="cpu")
    call.workspace = workspace.data_ptr()
    own.c.pw_winograd(ctypes.byref(call), own.parallel)


def _tiles(rows: int, columns: int) -> int:
    return -(-rows // 4) * -(-columns // 4)


def _blocks(channels: int, taps: int, frames: int) -> tuple[int, int]:
    """Return how many tiles and filters are computed at a time.

    Enough tiles that a filter is used often once it is in a register, few enough that what they
    become stays in the caches: 24 or 48 rows of the matrix products; as many filters as
    _FILTER_BYTES hold, and 64 at least, because the tiles are transformed once for each block.
    """
    tiles = max(1, 24 // frames) if channels <= 128 else max(1, min(24, 48 // frames))
    filters = _FILTER_BYTES // (36 * 4 * taps * channels)
    return tiles, max(64, filters // 64 * 64)


def normalisable(x: Tensor, gamma: Tensor, out: Tensor) -> bool:
    """Tell whether `normalise` takes these arguments of `channel_norm`.

    fp32, at most one batch, channels last and a multiple of 16, no gradients.
    """
    if not _all_plain(x, gamma, out) or x.dim() not in (4, 5):
        return False
    last = x.stride(1) == out.stride(1) == 1 and gamma.is_contiguous()
    return last and x.shape[0] == 1 and x.shape[1] % 16 == 0 and gamma.numel() == x.shape[1]


def normalise(x: Tensor, gamma: Tensor, silu: bool, out: Tensor) -> None:
    """Compute `channel_norm` in one pass over memory."""
    assert normalisable(x, gamma, out)
    if x.dim() == 4:
        x, out = x.unsqueeze(2), out.unsqueeze(2)
    own = library()
    call = _Norm(
        x=x.data_ptr(),
        gamma=gamma.data_ptr(),
        out=out.data_ptr(),
        x_frame=x.stride(2),
        x_row=x.stride(3),
        x_column=x.stride(4),
        out_frame=out.stride(2),
        out_row=out.stride(3),
        out_column=out.stride(4),
        channels=x.shape[1],
        frames=x.shape[2],
        rows=x.shape[3],
        columns=x.shape[4],
        silu=silu,
        threads=torch.get_num_threads(),
    )
    own.c.pw_channel_norm(ctypes.byref(call), own.parallel)


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] == 1


def _all_plain(*tensors: Tensor | None) -> bool:
    """Tell whether all are fp32 tensors with memory on the CPU that nobody differentiates."""
    if torch.compiler.is_compiling():
        return False
    gradients = torch.is_grad_enabled()
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (gradients and x.requires_grad)
        for x in tensors
        if x is not None
    )


def _openmp() -> Any:
    """Return the entry point of the OpenMP that PyTorch runs on. Raises OSError, AttributeError."""
    found = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    if found is None:
        raise OSError("no libtorch_cpu")
    return ctypes.cast(ctypes.CDLL(str(found)).GOMP_parallel, ctypes.c_void_p)
