# SPDX-License-Identifier: Apache-2.0
"""Compile the attention kernels; print their resources and instructions as JSON.

The portable and the Hopper kernel for every architecture, exact and block-sparse, and the Gluon
kernel for Hopper.
"""

from __future__ import annotations

import json
import re

import torch

from pw_kernels import sparse_attention
from pw_kernels.ahead_of_time import Compiled, compile_variant
from pw_kernels.attention import run_kernel
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.launcher import recording
from pw_kernels.library import ARCHS
from pw_kernels.op import using
from tests.kernels.compiling import Report, architectures, resources

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(128, "bf16", False), (64, "fp16", True)]  # width, dtype, bias
GLUON_CASES = [(width, dtype) for width in (128, 64) for dtype in DTYPES]
GPUS = {arch: gpu for gpu, arch in reversed(ARCHS.items())}  # the first of each architecture


def compiled(gpu: tuple[int, int], width: int, dtype: str, *, bias: bool, gluon: bool) -> Compiled:
    """Compile what self-attention of a 2K clip launches, or attention with a bias."""
    q = torch.empty(111600, 24, width, dtype=DTYPES[dtype], device="meta")
    with recording(gpu) as variants:
        run_kernel(q, q, q, q[:, 0, 0].contiguous() if bias else None, gluon)
    (variant,) = variants.values()
    return compile_variant(variant, ARCHS[gpu])


def compiled_sparse(gpu: tuple[int, int], width: int, dtype: str) -> Compiled:
    """Compile what block-sparse self-attention of a 2K clip launches."""
    q = torch.empty(111600, 24, width, dtype=DTYPES[dtype], device="meta")
    with recording(gpu) as variants, using("triton"), dispatch_anywhere():
        sparse_attention(q, q, q, (31, 45, 80), 0.25)
    (variant,) = variants.values()
    return compile_variant(variant, ARCHS[gpu])


def report(kernel: Compiled, *case: object) -> Report:
    instructions = re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]+)", kernel.ptx, re.MULTILINE)
    return {"case": case, **resources(kernel), "instructions": sorted(set(instructions))}


def gluon_report(width: int, dtype: str) -> Report:
    kernel = compiled((9, 0), width, dtype, bias=False, gluon=True)
    sass, ptx = kernel.sass(), kernel.ptx
    arrivals = [match.start() for match in re.finditer(r"mbarrier\.arrive\.shared", ptx)]
    between_waits = r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0"
    return {
        "case": [width, dtype],
        **resources(kernel),
        "sass": sorted(set(re.findall(r"\b[A-Z][A-Z0-9]{2,}\b", sass))),
        "parameters": len(re.findall(r"\.param .*kernel_param_\d+,?$", ptx, re.M)),
        "exponentials": [x.count("MUFU.EX2") for x in re.findall(between_waits, sass, re.S)],
        "arrivals": len(arrivals),
        "synchronised": sum(
            ptx.rfind("bar.sync", 0, at) > ptx.rfind("try_wait", 0, at) for at in arrivals
        ),
    }


if __name__ == "__main__":
    reports = []
    for arch in architectures():
        gpu = GPUS[arch]
        for width, dtype, bias in CASES:
            kernel = compiled(gpu, width, dtype, bias=bias, gluon=False)
            reports.append(report(kernel, width, dtype, bias))
            kernel = compiled_sparse(gpu, width, dtype)
            reports.append(report(kernel, width, dtype, "sparse"))
    print(json.dumps(reports + [gluon_report(*case) for case in GLUON_CASES]))
