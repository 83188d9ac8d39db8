# SPDX-License-Identifier: Apache-2.0
"""`pw build` and `pw engines`: build, list, verify and remove engines."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.cli.json_output import json_text
from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import (
    FOLDER,
    MODEL,
    PresetName,
    blocks_option,
    chunk_option,
    device_option,
    json_option,
    linear_option,
    precision_option,
    set_option,
)
from pw_runtime.cli.sizes import preset_of, size_options
from pw_runtime.errors import BadRequest
from pw_runtime.system.printable import printable

if TYPE_CHECKING:
    import torch

    from pw_engines import EngineStore, Platform
    from pw_engines.store import Entry
    from pw_export.build import Built, Event
    from pw_export.build_jobs import Job, Source
    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.execution.compilers import CompilerName
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Blocks, DitConfig, LinearFormat, Precision, Preset


@click.command()
@click.option("--model", type=MODEL, required=True, help="Bundle made by `pw convert`.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "aoti", "openvino"]),
    default="auto",
    show_default=True,
    help="auto: TensorRT if it is installed and there is a GPU, otherwise AOTInductor; on a CPU "
    "OpenVINO too, if it is installed, and each is measured; "
    "tensorrt-rtx builds for GPUs that need not be here.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="GPU architecture to build for with tensorrt-rtx: sm_80, sm_86, sm_89, sm_120, sm_121; "
    "may be repeated. [default: that of the GPU here, or all]",
)
@click.option(
    "--frontend",
    type=click.Choice(["onnx", "torch-tensorrt"]),
    help="How networks are passed to TensorRT. [default: onnx]",
)
@blocks_option
@chunk_option
@precision_option
@linear_option
@device_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Engines to build in parallel. [default: one per core; 1 on a GPU]",
)
@click.option("--dry-run", is_flag=True, help="Show what would be built, and build nothing.")
@click.option("--onnx-only", type=FOLDER, help="Write ONNX models to this folder instead.")
@click.option(
    "--preset",
    type=PresetName(),
    help="Also build the decoder, for this preset's resolution only; on a CPU with --backend aoti "
    "only. On a CPU engines are measured at the preset's sizes.",
)
@set_option
@size_options
@logging_options
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def build(**options: Any) -> int:
    """Compile a model's transformers, once for all presets; with --preset also the decoder."""
    from pw_export.build_jobs import pick_compilers, platform_for, require_attention_compiler
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.cli.build_speeds import NO_DECODER, show_speeds
    from pw_runtime.execution.block_division import (
        require_attention_precision,
        require_exact_attention,
    )
    from pw_runtime.execution.compilers import COMPILERS
    from pw_runtime.job.checks import default_precision, pick_device
    from pw_runtime.models.quantized_linear import require_quantizable
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import RunOptions

    reporter, device = Reporter(quiet=options["quiet"]), pick_device(options["device"])
    precision = default_precision(options["precision"], device)
    bundle = open_bundle(options["model"])
    preset = None
    if options["preset"] is not None:
        preset = preset_of(options)
    elif given := [x for x in ("changes", "size", "frames") if options[x] not in (None, ())]:
        option = given[0].replace("changes", "set")
        raise BadRequest(f"--{option} changes a preset, and none is named", do="add --preset NAME")
    chunk, folder, blocks = options["chunk"], options["onnx_only"], options["blocks"]
    linear = options["linear"]
    for config in _configs(bundle).values():
        require_quantizable(config, linear)
    require_exact_attention(blocks, linear)
    if folder is not None:
        others = {name: options[name] for name in ("frontend", "jobs")}
        others |= {"dry-run": options["dry_run"], "target": options["targets"]}
        others |= {"backend": options["backend"] != "auto", "blocks": blocks != "segments"}
        for name, given in others.items():
            if given:
                raise BadRequest(
                    f"--onnx-only and --{name} contradict each other", do="leave one of them out"
                )
        return _export_onnx(bundle, precision, chunk, folder, preset, linear, reporter)
    targets, backend = options["targets"], options["backend"]
    if backend == "auto" and (targets or blocks != "segments"):
        backend = "tensorrt-rtx"
    compilers = pick_compilers(backend, options["frontend"], device, precision, linear)
    if compilers[0] == "tensorrt-rtx" and options["precision"] is None:
        precision = "bf16"  # for a GPU, wherever it is built
    decoder = preset if device.type != "cpu" or backend != "auto" else None
    missing: list[Job] = []
    stored: list[Job] = []
    for compiler in compilers:
        platform = platform_for(compiler, device, targets, linear)
        require_attention_compiler(blocks, compiler, preset)
        require_attention_precision(blocks, precision)
        sources = _sources(bundle, precision, chunk, preset, compiler, blocks, linear)
        if decoder is not None and COMPILERS[compiler].decodes:
            sources.append(_decoder_source(bundle, decoder, compiler))
        where = dict(platform).get("targets", str(device)).replace(" ", ", ")
        heading = f"{compiler} engines for {where}, {precision}, up to {chunk} tokens"
        if linear != "exact":
            heading += f", {linear} linear layers"
        jobs, built = _pending(sources, compiler, device, platform, heading, reporter)
        missing += jobs
        stored += built
    if preset is not None:
        last = preset.highres or preset.draft
        if blocks != "segments":
            reporter.say(f"blocks as {blocks}: for clips of this preset only")
        if any(job.segment.startswith("vae_") for job in missing + stored):
            reporter.say(f"the decoder's engines are for {last.width}x{last.height} only")
        elif device.type == "cpu":
            reporter.say(NO_DECODER)
    if options["dry_run"]:
        for job in missing:
            reporter.say(f"  {job.key.folder}")
        return DONE
    workers = options["jobs"] or (1 if device.type == "cuda" else os.cpu_count() or 1)
    failed = _build(missing, stored, workers, reporter)
    if device.type == "cpu" and compilers != ["tensorrt-rtx"]:
        stages = RunOptions(precision=precision, device="cpu", chunk=chunk, linear=linear)
        removed = show_speeds([*missing, *stored], bundle, stages, preset, reporter)
        failed = failed or removed
    return SOME_FAILED if failed else DONE


def _export_onnx(
    bundle: Bundle,
    precision: Precision,
    chunk: int,
    folder: Path,
    preset: Preset | None,
    linear: LinearFormat,
    reporter: Reporter,
) -> int:
    """Write ONNX models of the transformers' segments, and of the decoder's with a preset."""
    from pw_runtime.system.packages import require_packages

    require_packages("`pw build --onnx-only`", "onnx", "onnxscript")
    from pw_export.onnx_export import export_onnx

    decoder = None if preset is None else (bundle.networks.vae.config, preset)
    export_onnx(_configs(bundle), precision, chunk, folder, reporter.say, decoder, linear)
    return DONE


def _configs(bundle: Bundle) -> dict[str, DitConfig]:
    """Return the widths of the bundle's transformers."""
    networks = bundle.networks
    configs = {"draft": networks.draft.config}
    if networks.highres is not None:
        configs["highres"] = networks.highres.config
    return configs


def _sources(
    bundle: Bundle,
    precision: Precision,
    chunk: int,
    preset: Preset | None,
    compiler: CompilerName,
    blocks: Blocks,
    linear: LinearFormat,
) -> list[Source]:
    """List the transformers to build engines for: those of the preset's stages, if it matters.

    Raises BadWeights where the bundle lacks one of these.
    """
    from pw_export.build_jobs import TransformerSource
    from pw_runtime.checkpoint.loader import require_dit

    sources: list[Source]
    if blocks == "segments" or preset is None:
        configs = _configs(bundle).values()
        sources = [TransformerSource(config, precision, chunk, linear=linear) for config in configs]
    else:
        sources = [
            TransformerSource(
                require_dit(bundle, name), precision, chunk, blocks, stage.tokens(preset.video)
            )
            for name, stage in preset.stages().items()
        ]
    return sources


def _decoder_source(bundle: Bundle, preset: Preset, compiler: CompilerName) -> Source:
    """Return the decoder for a preset. Raises BadWeights where weights to bake are damaged."""
    from pw_export.build_jobs import DecoderSource
    from pw_runtime.checkpoint.bundle import verify
    from pw_runtime.execution.compilers import COMPILERS

    if COMPILERS[compiler].bakes_weights:
        verify(bundle, bundle.networks.vae.files)
    return DecoderSource(bundle.root, preset)


def _pending(
    sources: list[Source],
    compiler: CompilerName,
    device: torch.device,
    platform: Platform,
    heading: str,
    reporter: Reporter,
) -> tuple[list[Job], list[Job]]:
    """Return the jobs whose engines are not built yet and those that are, and report how many."""
    from pw_export.build_jobs import jobs_for

    store = _open_store()
    jobs, built = jobs_for(sources, compiler, device, store, platform)
    reporter.say(f"{heading}, in {store.root}: {len(built)} built, {len(jobs)} to build")
    return jobs, built


def _build(jobs: list[Job], stored: list[Job], workers: int, reporter: Reporter) -> bool:
    """Build engines in parallel beside those in the store, report each; tell whether one failed."""
    from pw_export.build import run_jobs

    if not jobs:
        return False
    _open_store().make_root()

    def on_event(job: Job, event: Event) -> None:
        if event.kind == "line":
            reporter.say(event.text)
        else:
            tasks.show(job.key.folder, event.text)

    def on_built(built: Built) -> None:
        tasks.end(built.job.key.folder)
        if built.error is not None:
            reporter.warn(f"{built.job.key.folder}: {built.error}")
            return
        checked = "built by another process meanwhile"
        if built.parity:
            error = max(parity.error for parity in built.parity)
            checked = f"within {error:.1e} of its segment"
        elif built.seconds:
            checked = "compared with its segment when it first runs"
        reporter.say(f"{built.job.key.folder}: {built.seconds:.0f} s, {checked}")

    start = time.monotonic()
    with reporter.tasks() as tasks:
        results = run_jobs(jobs, workers, on_built, on_event)
    failed = [result.job for result in results if result.error is not None]
    reporter.say(f"{len(jobs) - len(failed)} engines in {time.monotonic() - start:.0f} s")
    if failed:
        outcome = _outcome(failed, [*jobs, *stored])
        reporter.warn(f"{len(failed)} of {len(jobs)} engines failed; {outcome}")
    return bool(failed)


def _outcome(failed: list[Job], jobs: list[Job]) -> str:
    """Say what will run where some of the jobs of a build failed.

    A network runs on engines only where one compiler has built all of them.
    """

    def compilers_of(some: list[Job], *, decoder: bool) -> set[str]:
        return {job.compiler for job in some if job.segment.startswith("vae_") == decoder}

    outcomes = []
    for name, decoder in (("model", False), ("decoder", True)):
        if lacking := compilers_of(failed, decoder=decoder):
            complete = ", ".join(sorted(compilers_of(jobs, decoder=decoder) - lacking))
            outcome = f"has all engines of {complete}" if complete else "will run without engines"
            outcomes.append(f"the {name} {outcome}")
    return ", ".join(outcomes)


def _open_store() -> EngineStore:
    """Return the engines on disk. Raises BadRequest where a file stands in their place."""
    from pw_engines import EngineStore
    from pw_runtime.system.places import check_cache

    store = EngineStore()
    check_cache(store.root)
    return store


@click.group()
def engines() -> None:
    """Manage built engines, in $PW_CACHE/engines or the user's cache directory."""


@engines.command("list")
@json_option
def list_engines(as_json: bool) -> int:
    """List the engines, with size and build time."""
    return _show(verify=False, as_json=as_json)


@engines.command("verify")
@json_option
def verify_engines(as_json: bool) -> int:
    """Read every engine and check its digest."""
    return _show(verify=True, as_json=as_json)


def _show(*, verify: bool, as_json: bool) -> int:
    store = _open_store()
    entries = store.entries(verify=verify)
    code = SOME_FAILED if any(entry.damage for entry in entries) else DONE
    if as_json:
        document = {
            "folder": str(store.root),
            "verified": verify,
            "engines": [
                {
                    "folder": entry.folder,
                    "segment": entry.segment,
                    "backend": entry.backend,
                    "bytes": entry.bytes,
                    "build_seconds": entry.seconds,
                    "targets": _targets(entry),
                    "times_as_fast": sorted(speed.ratio for speed in entry.speeds),
                    "damage": entry.damage or None,
                }
                for entry in entries
            ],
        }
        click.echo(json_text(document))
        return code
    for entry in entries:
        state = f"damaged: {entry.damage}" if entry.damage else f"built in {entry.seconds:.0f} s"
        if targets := _targets(entry):
            state += f" for {', '.join(targets)}"
        if ratios := sorted(speed.ratio for speed in entry.speeds):
            span = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1])))
            state += f", {span} times as fast as uncompiled"
        click.echo(printable(f"{entry.folder}  {entry.bytes / 2**20:6.1f} MiB  {state}"))
    click.echo(f"{len(entries)} engines in {store.root}")
    return code


def _targets(entry: Entry) -> list[str]:
    """Return the GPU architectures that an engine was built for, where it names some."""
    return str(dict(entry.key.get("platform", ())).get("targets", "")).split()


@engines.command("prune")
@click.option("--all", "everything", is_flag=True, help="Remove every engine.")
def prune_engines(everything: bool) -> int:
    """Remove engines that this version cannot use on this machine: damaged, foreign, incomplete."""
    from pw_export.build import unusable

    def reason_to_remove(entry: Entry) -> str | None:
        return "asked for" if everything else entry.damage or unusable(entry)

    store = _open_store()
    for folder, reason in store.prune(reason_to_remove):
        line = (
            f"removed {folder}: {reason}" if reason else f"kept {folder}: another process builds it"
        )
        click.echo(printable(line))
    for path in store.remove_leftovers():
        click.echo(f"removed {path.name}: an incomplete build")
    return DONE
