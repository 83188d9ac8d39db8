# SPDX-License-Identifier: Apache-2.0
"""Weights stored as fp8 with a scale, as the full-precision tensors that they stand for.

ComfyUI names the scale of `X.weight` `X.scale_weight` (beside a marker `scaled_fp8`) or
`X.weight_scale` (beside `X.comfy_quant`); both mean weight times scale, with one scale per tensor
or one per row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch

from pw_export.checkpoints.tensor_refs import FLOATS, Ref, Refs
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

_PRECISE = "take the fp16 or bf16 file of the same model"
FP8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
_SCALE = re.compile(r"(.*\.)?(scale_weight|weight_scale)")
_UNUSED = re.compile(r"(.*\.)?(scale_input|input_scale|scaled_fp8|comfy_quant|spiece_model)")


def dequantised(path: Path, refs: Refs, say: Callable[[str], None]) -> Refs:
    """Replace fp8 weights that have a scale by fp32 ones, rounded once, and drop the scales.

    Raises BadWeights for fp8 weights without a scale or with one of another shape, and for a scale
    of another weight unless it is 1.
    """
    unused = unused_names(refs)
    scales = {f"{match[1] or ''}weight": n for n in refs if (match := _SCALE.fullmatch(n))}
    fp8 = [name for name, ref in refs.items() if ref.dtype in FP8 and name not in unused]
    packed = [n for n in scales if n in refs and refs[n].dtype not in FP8 | FLOATS]
    if packed:
        raise _unread(path, f"{some_names(packed)}: {refs[packed[0]].dtype} with a scale")
    if raw := [name for name in fp8 if name not in scales]:
        raise _raw(path, refs, raw)
    gone = {*unused, *(scale for weight, scale in scales.items() if weight in refs)}
    rest = {name: ref for name, ref in refs.items() if name not in gone}
    for name, scale in scales.items():
        if name in fp8:
            rest[name] = _scaled(path, name, refs[name], refs[scale])
        elif name in refs and not _is_one(refs[scale]):
            raise BadWeights(
                f"{path} has a scale for a weight that is not fp8",
                got=f"{scale} for {name} ({refs[name].dtype})",
                wanted="scales of fp8 weights only",
                do=_PRECISE,
            )
    if fp8:
        say(f"{path.name}: {len(fp8)} fp8 tensors, multiplied by their scales and kept as float32")
    if unused:
        kinds = Counter(name.rpartition(".")[2] for name in unused)
        left = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        say(f"{path.name}: left out {left}, which no computation here needs")
    return rest


def unused_names(refs: Refs) -> list[str]:
    """Return the names of what only fp8 arithmetic needs, and of a tokenizer in the file."""
    return [name for name in refs if _UNUSED.fullmatch(name)]


def _scaled(path: Path, name: str, weight: Ref, scale: Ref) -> Ref:
    rows = weight.shape[0] if weight.shape else 1
    per_row = scale.shape in ((rows,), (rows, *(1 for _ in weight.shape[1:])))
    if prod(scale.shape) != 1 and not per_row:
        got = f"{name} {list(weight.shape)} with a scale of shape {list(scale.shape)}"
        raise _unread(path, got)
    shape = (rows, *(1 for _ in weight.shape[1:])) if per_row else ()
    return Ref(weight.shape, "float32", partial(_product, weight, scale, shape))


def _product(weight: Ref, scale: Ref, shape: tuple[int, ...]) -> torch.Tensor:
    return weight.read().float() * scale.read().float().reshape(shape)


def _is_one(scale: Ref) -> bool:
    return bool((scale.read().float() == 1).all())


def _unread(path: Path, got: str) -> BadWeights:
    return BadWeights(
        f"{path} is quantised in a way that is not read",
        got=got,
        wanted="fp8 with one scale per tensor or per row, or weights of 16 or 32 bits",
        do=_PRECISE,
    )


def _raw(path: Path, refs: Refs, raw: list[str]) -> BadWeights:
    return BadWeights(
        f"{path} holds fp8 weights without scales",
        got=f"{len(raw)} {refs[raw[0]].dtype} tensors: {some_names(raw)}",
        wanted="float16, bfloat16 or float32 weights, or fp8 ones with a scale each",
        do=f"{_PRECISE}: a plain cast to fp8 has lost the other bits of every weight",
    )
