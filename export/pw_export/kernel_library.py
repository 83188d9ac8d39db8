# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel that the 5B networks launch, for the library in kernels/native.

    python -m pw_export.kernel_library --out DIR [--arch 80 90 ...] [--kernel attention_hopper ...]

Run by CMakeLists.txt; needs Triton and no GPU. Leaves in DIR: cubins.bin (the machine code),
table.inc (C++: what lies where) and manifest.json.
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

ALIGNMENT = 64  # of a cubin in the file, bytes


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile for one architecture."""

    variant: Variant
    arch: int

    def run(self) -> Compiled:
        """Compile it. Raises what Triton raises."""
        return compile_variant(self.variant, self.arch)


def jobs_for(archs: Iterable[int], kernels: Iterable[str]) -> list[Job]:
    """Everything that the networks launch on GPUs of these architectures.

    Args:
        archs: keys of SHARED_LIMITS.
        kernels: names in _triton to keep; none for all of them.
    """
    wanted = set(kernels)
    by_key: dict[tuple[str, int], Job] = {}
    # GPUs with the same attention tilings launch the same variants
    discovered: dict[object, dict[str, Variant]] = {}
    for arch in archs:
        for gpu in (gpu for gpu, runs in ARCHS.items() if runs == arch):
            tilings = tilings_of(gpu)
            if tilings not in discovered:
                discovered[tilings] = variants_for(gpu)
            for key, variant in discovered[tilings].items():
                by_key[key, arch] = Job(variant, arch)
    jobs = list(by_key.values())
    unknown = wanted - {job.variant.kernel for job in jobs}
    if unknown:
        raise ValueError(f"the networks launch no kernel {', '.join(sorted(unknown))}")
    return [job for job in jobs if not wanted or job.variant.kernel in wanted]


def check(job: Job, built: Compiled) -> None:
    """Raise ValueError for machine code that could not be launched."""
    if not built.fits:
        raise ValueError(
            f"{job.variant.key} takes {built.shared_bytes} bytes of shared memory; "
            f"sm_{job.arch} has {SHARED_LIMITS[job.arch]}"
        )


def write_library(out: Path, jobs: list[Job], built: list[Compiled]) -> None:
    """Write cubins.bin, table.inc and manifest.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    lines, entries, offset = [], [], 0
    with atomic_file(out / "cubins.bin") as partial, partial.open("wb") as file:
        for job, one in zip(jobs, built, strict=True):
            parameters = "".join(letter(kind) for _, kind in job.variant.types)
            texts = ", ".join(json.dumps(text) for text in (job.variant.key, one.name, parameters))
            numbers = f"{one.arch}, {one.num_warps}, {one.registers}, {one.stack_bytes}"
            numbers += f", {one.shared_bytes}, {one.scratch_bytes}"
            lines.append(f"{{{{{texts}, {numbers}}}, {offset}}},\n")
            entries.append(entry(job, one))
            padding = -len(one.cubin) % ALIGNMENT
            file.write(one.cubin + bytes(padding))
            offset += len(one.cubin) + padding
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


def entry(job: Job, one: Compiled) -> dict[str, object]:
    """A kernel as the manifest shows it."""
    return {
        "kernel": job.variant.kernel,
        "key": job.variant.key,
        "arch": job.arch,
        "constants": dict(job.variant.constants),
        "warps": one.num_warps,
        "registers": one.registers,
        "stack_bytes": one.stack_bytes,
        "shared_bytes": one.shared_bytes,
        "scratch_bytes": one.scratch_bytes,
        "cubin_bytes": len(one.cubin),
    }


def main(arguments: list[str] | None = None) -> int:
    """Compile, check and write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", type=int, nargs="*", default=[*SHARED_LIMITS])
    parser.add_argument("--kernel", nargs="*", default=[], help="only these, by name in _triton")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    if not set(given.arch) <= set(SHARED_LIMITS):
        parser.error(f"--arch expects numbers among {list(SHARED_LIMITS)}, got {given.arch}")
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
        for job, one in zip(jobs, built, strict=True):
            check(job, one)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    write_library(given.out, jobs, built)
    print(f"{sum(len(one.cubin) for one in built) / 2**20:.1f} MiB of machine code")
    return 0


if __name__ == "__main__":
    sys.exit(main())
