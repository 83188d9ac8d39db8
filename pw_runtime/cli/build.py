# SPDX-License-Identifier: Apache-2.0
"""`pw build` and `pw engines`: engines made, listed, verified and removed."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib import import_module
from typing import Any

import click

from pw_runtime.cli.options import (
    DONE,
    FOLDER,
    SOME_FAILED,
    chunk_option,
    device_option,
    precision_option,
)
from pw_runtime.errors import BadRequest


@click.command()
@click.option("--model", type=FOLDER, required=True, help="Bundle made by `pw convert`.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "aoti"]),
    default="auto",
    show_default=True,
    help="auto: TensorRT where it is installed, else AOTInductor.",
)
@click.option(
    "--frontend",
    type=click.Choice(["onnx", "torch-tensorrt"]),
    help="What TensorRT is given the networks by. [default: onnx]",
)
@chunk_option
@precision_option
@device_option
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Built at a time. [default: one a core, 1 on a GPU]"
)
@click.option("--dry-run", is_flag=True, help="Say what would be built, and build nothing.")
@click.option("--onnx-only", type=FOLDER, help="Write ONNX models of all segments there instead.")
@click.option("--preset", help="The decoder too, for pictures of this preset's size alone.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
def build(**options: Any) -> int:
    """Compile a model's transformers, once for every preset, and the decoder for one of them."""
    from pw_engines import EngineStore
    from pw_runtime.checkpoint.bundle import open_bundle, verify
    from pw_runtime.execution.engine_lookup import COMPILERS
    from pw_runtime.job.preflight import default_precision, pick_device
    from pw_runtime.presets import find_preset
    from pw_runtime.system.progress import Reporter

    # By name: the runtime must not import what stands above it.
    make, onnx = import_module("pw_export.build"), import_module("pw_export.onnx_export")
    reporter = Reporter(quiet=options["quiet"])
    device = pick_device(options["device"])
    precision = default_precision(options["precision"], device)
    bundle = open_bundle(options["model"])
    networks = bundle.networks
    preset = None if options["preset"] is None else find_preset(options["preset"])
    configs = {"draft": networks.draft.config}
    if networks.highres is not None:
        configs["highres"] = networks.highres.config
    if options["onnx_only"] is not None:
        if options["dry_run"]:
            raise BadRequest("--onnx-only and --dry-run", do="give one of them")
        if options["frontend"] is not None:
            raise BadRequest("--onnx-only and --frontend", do="give one of them")
        decoder = None if preset is None else (networks.vae.config, preset)
        onnx.export_onnx(
            configs, precision, options["chunk"], options["onnx_only"], reporter.say, decoder
        )
        return DONE
    compiler = make.pick_compiler(options["backend"], options["frontend"], device)
    sources = [make.TransformerSource(one, precision, options["chunk"]) for one in configs.values()]
    if preset is not None:
        if COMPILERS[compiler].bakes:
            verify(bundle, networks.vae.files)
        sources.append(make.DecoderSource(bundle.root, preset))
    store = EngineStore()
    jobs, fresh = make.jobs_for(sources, compiler, device, store)
    reporter.say(
        f"{compiler} engines for {device}, {precision}, up to {options['chunk']} tokens, in "
        f"{store.root}: {len(fresh)} built, {len(jobs)} to build"
    )
    if preset is not None:
        last = preset.highres or preset.draft
        reporter.say(f"those of the decoder are for {last.width}x{last.height} alone")
    for job in jobs if options["dry_run"] else ():
        reporter.say(f"  {job.key.folder}")
    if options["dry_run"] or not jobs:
        return DONE
    store.make_root()
    workers = options["jobs"] or (1 if device.type == "cuda" else os.cpu_count() or 1)

    def on_built(built: Any) -> None:
        if built.error is not None:
            reporter.warn(f"{built.job.key.folder}: {built.error}")
            return
        worst = max((one.error for one in built.parity), default=0.0)
        reporter.say(f"{built.job.key.folder}: {built.seconds:.0f} s, {worst:.1e} from its segment")

    start = time.monotonic()
    told = [replace(job, quiet=options["quiet"]) for job in jobs]
    failed = [one for one in make.run_jobs(told, workers, on_built) if one.error is not None]
    done = len(jobs) - len(failed)
    reporter.say(f"{done} engines in {time.monotonic() - start:.0f} s")
    if failed:
        reporter.warn(f"{len(failed)} of {len(jobs)} engines failed: the model runs without any")
        return SOME_FAILED
    return DONE


@click.group()
def engines() -> None:
    """Engines that were built: $PW_CACHE/engines, else in the user's cache directory."""


@engines.command("list")
def list_engines() -> int:
    """List the engines, with size and time of building."""
    return _show(verify=False)


@engines.command("verify")
def verify_engines() -> int:
    """Read every engine and compare it with its digest."""
    return _show(verify=True)


def _show(*, verify: bool) -> int:
    from pw_engines import EngineStore

    store = EngineStore()
    entries = store.entries(verify=verify)
    for one in entries:
        state = f"damaged: {one.damage}" if one.damage else f"built in {one.seconds:.0f} s"
        click.echo(f"{one.folder}  {one.bytes / 2**20:6.1f} MiB  {state}")
    click.echo(f"{len(entries)} engines in {store.root}")
    return SOME_FAILED if any(one.damage for one in entries) else DONE


@engines.command("prune")
@click.option("--all", "everything", is_flag=True, help="Remove every engine.")
def prune_engines(everything: bool) -> int:
    """Remove what no run of this version on this machine can use: damaged, foreign, half built."""
    from pw_engines import EngineStore

    unusable = import_module("pw_export.build").unusable
    store = EngineStore()
    entries = store.entries(verify=True)
    for one in entries:
        reason = "asked for" if everything else one.damage or unusable(one)
        if reason:
            store.remove(one.folder)
            click.echo(f"removed {one.folder}: {reason}")
    for path in store.remove_leftovers():
        click.echo(f"removed {path.name}: a build that was cut short")
    return DONE
