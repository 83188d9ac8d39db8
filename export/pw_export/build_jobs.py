# SPDX-License-Identifier: Apache-2.0
"""Jobs of a build: the segments of networks that are not in the store, for one compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pw_engines import EngineKey, EngineStore, FrontEnd, Platform, aoti, openvino, tensorrt
from pw_engines.tensorrt import rtx, torch_tensorrt
from pw_export.linear_formats import able, has_format, require_buildable
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.loader import load_decoder
from pw_runtime.errors import BadRequest
from pw_runtime.execution.compilers import COMPILERS, Compiler, CompilerName
from pw_runtime.execution.decoder_lookup import decoder_segments
from pw_runtime.execution.engine_lookup import in_order, keys_of
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.types import Blocks, DitConfig, LinearFormat, Precision, Preset

Builders = dict[CompilerName, Callable[[torch.device], str | None]]


class Source(Protocol):
    """A network whose segments are built; can be sent to a worker process."""

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Return the segments by name for the engines of a compiler.

        Weights that become part of them are loaded to `device`; without a device, segments can be
        looked up in the store but not built.
        """
        ...


@dataclass(frozen=True, slots=True)
class TransformerSource:
    """A transformer, for any checkpoint of its config.

    Engines with attention inside take `tokens`, those of a preset's clip.
    """

    config: DitConfig
    precision: Precision
    chunk: int
    blocks: Blocks = "segments"
    tokens: int = 0
    linear: LinearFormat = "exact"

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Return the segments; compiler and device do not matter, as weights are inputs."""
        return segments_of(
            self.config,
            self.precision,
            self.chunk,
            self.linear,
            blocks=self.blocks,
            tokens=self.tokens,
        )


@dataclass(frozen=True, slots=True)
class DecoderSource:
    """The decoder of a bundle, for the final resolution of a preset."""

    bundle: Path
    preset: Preset

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Return the segments; see `Source`. Raises BadWeights."""
        bundle = open_bundle(self.bundle)
        baked = (
            load_decoder(bundle, device) if compiler.bakes_weights and device is not None else None
        )
        return decoder_segments(bundle, self.preset, compiler, baked)


@dataclass(frozen=True, slots=True)
class Job:
    """An engine to build; can be sent to a worker process."""

    source: Source
    segment: str
    compiler: CompilerName
    device: str
    store: Path
    key: EngineKey


def pick_compilers(
    backend: str,
    frontend: FrontEnd | None,
    device: torch.device,
    precision: Precision,
    linear: LinearFormat,
) -> list[CompilerName]:
    """Choose compilers: the best that is available, or the requested one.

    For a CPU "auto" gives all that are available and have the precision and the format of linear
    layers, for `build_speed` to compare.

    Raises BadRequest with the reason if none is available.
    """
    first = pick_compiler(backend, frontend, device)
    fitting = precision == "fp32" and has_format("openvino", linear)
    if first == "openvino":
        if precision != "fp32":
            raise BadRequest(
                "OpenVINO's engines are fp32: in bf16 its blocks were off by a fifth",
                got=f"--precision {precision}",
                do="use --precision fp32, or --backend aoti",
            )
        return [first]
    several = backend == "auto" and frontend is None and device.type == "cpu" and fitting
    return [first, "openvino"] if several and not openvino.unavailable(device) else [first]


def pick_compiler(backend: str, frontend: FrontEnd | None, device: torch.device) -> CompilerName:
    """Choose a compiler: the best that is available, or the requested one.

    Args:
        backend: "tensorrt", "tensorrt-rtx", "aoti", "openvino" or "auto".
        frontend: front end of TensorRT, which it implies; None: ONNX if TensorRT is used.
        device: device to build for.

    Raises BadRequest with the reason if the compiler is not available.
    """
    if frontend is not None and backend not in ("auto", "tensorrt"):
        raise BadRequest(
            "--frontend is an option of TensorRT",
            got=f"--frontend {frontend} with --backend {backend}",
            do="omit one of them",
        )
    if frontend is not None:
        backend = "tensorrt"
    by_torch: Builders = {"torch-tensorrt": torch_tensorrt.unavailable}
    others: Builders = {
        "tensorrt": tensorrt.unavailable,
        # By itself only for a GPU that is here; for another one it must be asked for.
        "tensorrt-rtx": rtx.cannot_run if backend == "auto" else rtx.cannot_build_for,
        "aoti": aoti.unavailable,
        "openvino": openvino.unavailable,
    }
    builders = by_torch if frontend == "torch-tensorrt" else others
    reasons = {
        name: builders[name](device)
        for name in (in_order(device) if backend == "auto" else COMPILERS)
        if name in builders and backend in ("auto", COMPILERS[name].backend)
    }
    for name, reason in reasons.items():
        if reason is None:
            return name
    where = "the CPU" if device.type == "cpu" else str(device)
    raise BadRequest(
        f"no engines can be built for {where}" + (f" by {backend}" * (backend != "auto")),
        got="; ".join(filter(None, reasons.values())),
        do="mend what is said above, or generate without engines, which needs no `pw build`",
    )


def require_attention_compiler(blocks: Blocks, name: CompilerName, preset: Preset | None) -> None:
    """Raise BadRequest where engines with attention inside cannot be built by a compiler.

    Their size is that of a preset's clips.
    """
    if blocks == "segments":
        return
    if name != "tensorrt-rtx":
        raise BadRequest(
            f"--blocks {blocks} is for TensorRT for RTX, which has kernels for attention this long",
            got=f"the compiler {name}",
            do="add --backend tensorrt-rtx, or leave --blocks out",
        )
    if preset is None:
        raise BadRequest(
            f"--blocks {blocks} makes engines that take all tokens of a clip at once",
            got="no preset to count them by",
            do="add --preset",
        )


def platform_for(
    name: CompilerName,
    device: torch.device,
    targets: Sequence[str] = (),
    linear: LinearFormat = "exact",
) -> Platform:
    """Return what to build engines for: the device, or GPU architectures that are named.

    Raises BadRequest for targets that the compiler does not have, and where the compiler or a GPU
    does not have the format of linear layers.
    """
    platform = _platform_for(name, device, targets, linear)
    require_buildable(linear, name, platform)
    return platform


def _platform_for(
    name: CompilerName, device: torch.device, targets: Sequence[str], linear: LinearFormat
) -> Platform:
    if name != "tensorrt-rtx":
        if targets:
            raise BadRequest(
                "--target is an option of TensorRT for RTX",
                got=f"--target {' --target '.join(targets)} with the compiler {name}",
                do="add --backend tensorrt-rtx, or leave --target out",
            )
        return COMPILERS[name].platforms(device)[0]
    default = rtx.default_targets(device)
    named = tuple(dict.fromkeys(targets)) or able(linear, default) or default
    if reason := rtx.cannot_build(named):
        raise BadRequest("engines cannot be built for these targets", got=reason)
    return rtx.target_platform(named)


def jobs_for(
    sources: Iterable[Source],
    name: CompilerName,
    device: torch.device,
    store: EngineStore,
    platform: Platform,
) -> tuple[list[Job], list[Job]]:
    """Return the engines to build and those already in the store, each once for all sources.

    `platform` is what they are built for: that of the device, or one with targets.
    """
    missing: dict[str, Job] = {}
    stored: dict[str, Job] = {}
    for source in sources:
        for segment_name, segment in source.segments(COMPILERS[name], None).items():
            (key,) = keys_of(segment, name, [platform])
            job = Job(source, segment_name, name, str(device), store.root, key)
            (missing if store.find(key).path is None else stored)[key.digest] = job
    return list(missing.values()), list(stored.values())
