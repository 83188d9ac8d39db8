# SPDX-License-Identifier: Apache-2.0
"""Selection of the engines of a network: built by `pw build`, or the segments themselves.

Nothing is compiled here. What runs is reported (engine_report.py), and recorded in the receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch

from pw_engines import (
    Backend,
    Engine,
    EngineError,
    EngineKey,
    EngineStore,
    FrontEnd,
    Platform,
    aoti,
    tensorrt,
)
from pw_engines.eager import EagerEngine
from pw_engines.engine import SegmentFunction
from pw_engines.spec import digest_of
from pw_engines.store import Lookup
from pw_engines.tensorrt import rtx, torch_tensorrt
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import require_dit
from pw_runtime.errors import BadRequest
from pw_runtime.execution.block_division import require_attention_engines, require_exact_attention
from pw_runtime.execution.sparse_stage import kept_fraction, sparse_approximation
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.models.quantized_linear import approximation
from pw_runtime.presets import preset_name
from pw_runtime.system.places import check_cache, require_temporary_room
from pw_runtime.types import CHUNK, EnginePolicy, Preset, RunOptions, StageName

# Reasons why a network runs on its segments.
ASKED_FOR: Final = "asked for"
NONE_BUILT: Final = "no engine is built"

CompilerName = Literal["tensorrt", "torch-tensorrt", "tensorrt-rtx", "aoti"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """Keys and loading of the engines of one compiler.

    Attributes:
        backend: that runs them.
        file: name of an engine's file in the store.
        unavailable: why they cannot be run on a device.
        platforms: what engines that run on a device were built for, the best first; new ones for
            that device are built for the first.
        load: opens one.
        check: compares one with its segment at its first run on a device; None: that was done when
            it was built.
        frontend: of TensorRT.
        bakes_weights: the decoder's weights become part of its engines.
    """

    backend: Backend
    file: str
    unavailable: Callable[[torch.device], str | None]
    platforms: Callable[[torch.device], Sequence[Platform]]
    load: Callable[..., Engine]
    check: Callable[[Any, SegmentFunction, torch.device], None] | None = None
    frontend: FrontEnd | None = None
    bakes_weights: bool = False

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """Options that are part of a key."""
        return () if self.frontend is None else (("frontend", self.frontend),)


COMPILERS: Mapping[CompilerName, Compiler] = MappingProxyType(
    {  # in the order of preference; see `in_order`
        "tensorrt": Compiler(
            backend="tensorrt",
            file=tensorrt.FILE,
            unavailable=tensorrt.unavailable,
            platforms=lambda device: [tensorrt.tensorrt_platform(device)],
            load=tensorrt.load,
            frontend="onnx",
            bakes_weights=True,
        ),
        "torch-tensorrt": Compiler(
            backend="tensorrt",
            file=tensorrt.FILE,
            unavailable=tensorrt.unavailable,  # to run: the front end only builds
            platforms=lambda device: [torch_tensorrt.torch_platform(device)],
            load=tensorrt.load,
            frontend="torch-tensorrt",
            bakes_weights=True,
        ),
        "tensorrt-rtx": Compiler(
            backend="tensorrt-rtx",
            file=rtx.FILE,
            unavailable=rtx.cannot_run,
            platforms=rtx.platforms_for,
            load=rtx.load,
            check=rtx.check_first_run,
        ),
        "aoti": Compiler(
            backend="aoti",
            file=aoti.FILE,
            unavailable=aoti.unavailable_to_run,
            platforms=lambda device: [aoti.aoti_platform(device)],
            load=aoti.load,
        ),
    }
)


# Targets of TensorRT for RTX that it comes first for; data-centre GPUs are TensorRT's.
RTX_FIRST: Final = frozenset({"sm_86", "sm_89", "sm_120", "sm_121"})


def in_order(device: torch.device) -> tuple[CompilerName, ...]:
    """Return the compilers in the order in which they are tried for a device."""
    names = tuple(COMPILERS)
    if device.type != "cuda" or not torch.cuda.is_available():
        return names
    rtx_first = rtx.target_of(device) in RTX_FIRST
    return tuple(sorted(names, key=lambda name: rtx_first and name != "tensorrt-rtx"))


def keys_of(segment: Segment, name: CompilerName, platforms: Iterable[Platform]) -> list[EngineKey]:
    """Return the keys of a segment's engines for these platforms."""
    compiler = COMPILERS[name]
    return [
        EngineKey(
            spec=segment.spec,
            backend=compiler.backend,
            platform=platform,
            options=compiler.options,
        )
        for platform in platforms
    ]


@dataclass(frozen=True, slots=True)
class EngineSet:
    """A network's segments, the engines that run them, and why these were selected."""

    segments: Mapping[str, Segment]
    engines: Mapping[str, Engine]
    backend: Backend
    reason: str
    digest: str = ""  # over the keys of built engines
    linear: str = ""  # what is approximate in the network's linear layers
    attention: str = ""  # and in its self-attention

    @property
    def padded(self) -> bool:
        """True if an engine takes only whole chunks."""
        return any(engine.padded for engine in self.engines.values())

    @property
    def scratch(self) -> int:
        """Bytes of scratch memory on the device, shared by the engines."""
        return max((engine.scratch for engine in self.engines.values()), default=0)

    def to_dict(self) -> dict[str, str]:
        """Return the entry of a receipt."""
        entry = {"backend": self.backend, "reason": self.reason}
        entry |= {"digest": self.digest} if self.digest else {}
        entry |= {"linear": self.linear} if self.linear else {}
        return entry | ({"attention": self.attention} if self.attention else {})


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The reason why a store has no engines for a network on this machine."""

    reason: str


def build_command(options: RunOptions, bundle: Path) -> str:
    """Return the command that builds a model's engines for these options."""
    device, auto = options.torch_device, "cuda" if torch.cuda.is_available() else "cpu"
    precision = options.compute_precision
    flags = []
    if precision != ("fp32" if device.type == "cpu" else "bf16"):
        flags.append(f"--precision {precision}")
    if options.chunk != CHUNK:
        flags.append(f"--chunk {options.chunk}")
    if options.linear != "exact":
        flags.append(f"--linear {options.linear}")
    if str(device) != auto:
        flags.append(f"--device {device}")
    if options.blocks != "segments":
        flags.append(f"--blocks {options.blocks}")
    return " ".join((f"pw build --model {bundle}", *flags))


def eager_engines(segments: Mapping[str, Segment]) -> dict[str, Engine]:
    """Wrap the segments themselves as engines."""
    return {name: EagerEngine(segment.spec, segment.module) for name, segment in segments.items()}


def select_engines(
    bundle: Bundle, stage: StageName, options: RunOptions, preset: Preset
) -> EngineSet:
    """Select the engines of a transformer.

    Raises:
        BadRequest: engines were asked for and are missing, or one cannot be opened.
        BadWeights: the bundle has no such network.
    """
    config, blocks, device = require_dit(bundle, stage), options.blocks, options.torch_device
    tokens = preset.stages()[stage].tokens(preset.video)
    precision, linear = options.compute_precision, options.linear
    require_exact_attention(blocks, linear)
    segments = segments_of(config, precision, options.chunk, linear, blocks=blocks, tokens=tokens)
    command = build_command(options, bundle.root)
    if blocks != "segments":
        require_attention_engines(options)
        command = f"{command} --preset {preset_name(preset)}"
        option = f"--blocks {blocks}"
        return choose_engines(segments, "engines", EngineStore(), device, command, option)
    # Engines contain kernels of their own: with --kernels triton, the segments run.
    policy = "eager" if options.kernels == "triton" else options.policy
    engines = choose_engines(segments, policy, EngineStore(), device, command)
    keep = kept_fraction(options, stage)
    return replace(
        engines,
        linear="" if linear == "exact" else approximation(config.num_layers, linear),
        attention="" if keep is None else sparse_approximation(keep, tokens),
    )


def choose_engines(
    segments: Mapping[str, Segment],
    policy: EnginePolicy,
    store: EngineStore,
    device: torch.device,
    command: str,
    option: str = "--policy engines",
) -> EngineSet:
    """Choose engines for all segments, from one backend.

    Args:
        segments: of a network, by name.
        policy: "auto" takes engines if the store has all of them, otherwise the segments
            themselves; "engines" takes engines only; "eager" the segments.
        store: the engines on disk.
        device: the device that they run on.
        command: builds them.
        option: asks for engines, where `policy` is "engines".

    Raises:
        BadRequest: engines were asked for and are missing, or one cannot be opened.
    """
    reason = ASKED_FOR
    if policy != "eager":
        result = find_engines(lambda compiler: segments, store, device, command)
        if isinstance(result, EngineSet):
            return result
        reason = result.reason
    if policy == "engines":
        raise BadRequest(
            f"{store.root} has no engines for this model on this machine, as {option} asks",
            got=reason,
            do=f"run `{command}` first, or leave {option} out",
        )
    return EngineSet(segments, eager_engines(segments), "eager", reason)


def find_engines(
    segments_for: Callable[[Compiler], Mapping[str, Segment]],
    store: EngineStore,
    device: torch.device,
    command: str,
) -> EngineSet | Unavailable:
    """Load the engines of the first compiler that has built all of them.

    Args:
        segments_for: gives the segments, by name, that a compiler's engines are made from.
        store: the engines on disk.
        device: the device that they run on.
        command: builds them.

    Raises:
        BadRequest: an engine cannot be opened, the store's place is a file, or there is no room for
            temporary files.
    """
    check_cache(store.root)
    missing: dict[str, str] = {}
    for label in in_order(device):
        compiler = COMPILERS[label]
        reason = compiler.unavailable(device)
        if reason:
            if device.type != "cpu":  # what cannot run on one is for GPUs
                missing[compiler.backend] = reason  # once for both front ends
            continue
        segments, platforms = segments_for(compiler), compiler.platforms(device)
        keys, files = {}, {}
        for name, segment in segments.items():
            keys[name], files[name] = _first(store, keys_of(segment, label, platforms))
        absent = [f"{name} ({file.reason})" for name, file in files.items() if file.path is None]
        if absent:
            none = len(absent) == len(files)
            missing[label] = NONE_BUILT if none else f"no {', '.join(absent)}"
            continue
        if compiler.backend == "aoti":  # which PyTorch unpacks before it opens them
            size = sum(file.path.stat().st_size for file in files.values() if file.path)
            require_temporary_room(2 * size + 16 * 2**20, "unpacking engines")
        try:
            engines = {
                name: _load(compiler, segments[name], file.path, device)
                for name, file in files.items()
            }
        except EngineError as error:
            raise BadRequest(
                f"an engine in {store.root} cannot be opened",
                got=error,
                do=f"run `pw engines prune --all` and `{command}`, or add --policy eager",
            ) from error
        by = f", front end {compiler.frontend}" if compiler.frontend else ""
        digest = digest_of(keys[name].digest.encode() for name in sorted(keys))
        reason = f"built engines in {store.root}{by}"
        return EngineSet(segments, engines, compiler.backend, reason, digest)
    reasons = list(missing.values())
    if len(reasons) > 1:
        reasons = [f"{label}: {reason}" for label, reason in missing.items()]
    return Unavailable("; ".join(reasons))


def scratch_for(
    segments: Mapping[str, Segment], store: EngineStore, target: str
) -> int | Unavailable:
    """Return the bytes of scratch memory of a network's plans for a target of TensorRT for RTX.

    The builder said it: no GPU is needed.
    """
    platforms, sizes = rtx.platforms_of(target), []
    for name, segment in segments.items():
        _, file = _first(store, keys_of(segment, "tensorrt-rtx", platforms))
        if file.path is None:
            return Unavailable(f"{name}: {file.reason}")
        sizes.append(rtx.scratch_of(file.path))
    return max(sizes)


def _first(store: EngineStore, keys: Sequence[EngineKey]) -> tuple[EngineKey, Lookup]:
    """Find the first engine that is built; with none, return the first key and what it lacks."""
    found = [(key, store.find(key)) for key in keys]
    return next((pair for pair in found if pair[1].path is not None), found[0])


def _load(compiler: Compiler, segment: Segment, path: Path | None, device: torch.device) -> Engine:
    """Open an engine, and check it where that has not been done. Raises EngineError."""
    engine = compiler.load(segment.spec, path, device)
    if compiler.check is not None:
        compiler.check(engine, segment.module, device)
    return engine
