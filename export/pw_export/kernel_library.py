# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel that the 5B networks launch, for the library in kernels/native.

    python -m pw_export.kernel_library --out DIR [--arch 80 90 ...] [--kernel attention_hopper ...]

Run by CMakeLists.txt; needs Triton but no GPU. Writes to DIR: cubins.bin (machine code), table.inc
(its table of contents in C++) and manifest.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pw_export.kernel_discovery import variants_for
from pw_kernels.ahead_of_time import SHARED_LIMITS, Compiled, assembler, compile_variant
from pw_kernels.attention.variants import tilings_of
from pw_kernels.library import ARCHS, FORMAT, letter, source_digest
from pw_kernels.variant import Variant
from pw_runtime.system.atomic_files import atomic_file, write_text

ALIGNMENT = 64  # bytes, of each cubin in the file


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile for one architecture."""

    variant: Variant
    arch: int

    def run(self) -> Compiled:
        """Compile the kernel. Passes on Triton's errors."""
        return compile_variant(self.variant, self.arch)


def jobs_for(archs: Iterable[int], kernels: Iterable[str]) -> list[Job]:
    """List every kernel that the networks launch on GPUs of these architectures.

    Args:
        archs: keys of SHARED_LIMITS.
        kernels: names in _triton to restrict the list to; empty: all.

    Raises:
        ValueError: the networks launch no kernel of such a name.
    """
    selected = set(kernels)
    by_key: dict[tuple[str, int], Job] = {}
    # GPUs with the same attention tilings launch the same variants.
    discovered: dict[object, dict[str, Variant]] = {}
    for arch in archs:
        for gpu in (gpu for gpu, compiled_for in ARCHS.items() if compiled_for == arch):
            tilings = tilings_of(gpu)
            if tilings not in discovered:
                discovered[tilings] = variants_for(gpu)
            for key, variant in discovered[tilings].items():
                by_key[key, arch] = Job(variant, arch)
    jobs = list(by_key.values())
    unknown = selected - {job.variant.kernel for job in jobs}
    if unknown:
        raise ValueError(f"the networks launch no kernel named {', '.join(sorted(unknown))}")
    return [job for job in jobs if not selected or job.variant.kernel in selected]


def check(job: Job, built: Compiled) -> None:
    """Raise ValueError for machine code that cannot be launched."""
    if not built.fits:
        raise ValueError(
            f"{job.variant.key} needs {built.shared_bytes} bytes of shared memory; "
            f"sm_{job.arch} has {SHARED_LIMITS[job.arch]}"
        )


def write_library(out: Path, jobs: list[Job], built: list[Compiled]) -> None:
    """Write cubins.bin, table.inc and manifest.json to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    lines, entries, offset = [], [], 0
    with atomic_file(out / "cubins.bin") as partial, partial.open("wb") as file:
        for job, kernel in zip(jobs, built, strict=True):
            parameters = "".join(letter(dtype) for _, dtype in job.variant.types)
            texts = (job.variant.key, kernel.name, parameters)
            numbers = (
                *(kernel.arch, kernel.num_warps, kernel.registers),
                *(kernel.stack_bytes, kernel.shared_bytes, kernel.scratch_bytes),
            )
            fields = ", ".join([*map(json.dumps, texts), *map(str, numbers)])
            lines.append(f"{{{{{fields}}}, {offset}}},\n")
            entries.append(entry(job, kernel))
            padding = -len(kernel.cubin) % ALIGNMENT
            file.write(kernel.cubin + bytes(padding))
            offset += len(kernel.cubin) + padding
    write_text(out / "table.inc", "".join(lines))
    manifest = {
        "format": FORMAT,
        "triton": importlib.import_module("triton").__version__,
        "sources": source_digest(),
        "toolchains": {
            str(one.arch): {**asdict(one.toolchain), "driver": one.toolchain.driver}
            for one in built
        },
        "kernels": entries,
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def entry(job: Job, kernel: Compiled) -> dict[str, object]:
    """Return a kernel's entry in the manifest."""
    return {
        "kernel": job.variant.kernel,
        "key": job.variant.key,
        "arch": job.arch,
        "constants": dict(job.variant.constants),
        "warps": kernel.num_warps,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack_bytes,
        "shared_bytes": kernel.shared_bytes,
        "scratch_bytes": kernel.scratch_bytes,
        "cubin_bytes": len(kernel.cubin),
    }


def main(arguments: list[str] | None = None) -> int:
    """Compile, check and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", type=int, nargs="*", default=[*SHARED_LIMITS])
    parser.add_argument("--kernel", nargs="*", default=[], help="only these, by name in _triton")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    if not set(given.arch) <= set(SHARED_LIMITS):
        parser.error(f"--arch: expected numbers among {list(SHARED_LIMITS)}, got {given.arch}")
    try:
        for arch in given.arch:
            assembler(arch)
        jobs = jobs_for(given.arch, given.kernel)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"compiling {len(jobs)} kernels for {' '.join(f'sm_{arch}' for arch in given.arch)}")
    with ProcessPoolExecutor(given.jobs) as pool:
        built = list(pool.map(Job.run, jobs))
    try:
        for job, kernel in zip(jobs, built, strict=True):
            check(job, kernel)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    write_library(given.out, jobs, built)
    print(f"{sum(len(kernel.cubin) for kernel in built) / 2**20:.1f} MiB of machine code")
    return 0


if __name__ == "__main__":
    sys.exit(main())
