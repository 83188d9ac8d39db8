# SPDX-License-Identifier: Apache-2.0
"""Selection of the engines of a network: built by `pw build`, or the segments themselves.

Nothing is compiled here. What runs is reported (engine_report.py), and recorded in the receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from pw_engines import (
    Backend,
    Engine,
    EngineError,
    EngineKey,
    EngineStore,
    Platform,
)
from pw_engines.eager import EagerEngine
from pw_engines.spec import digest_of
from pw_engines.store import Lookup
from pw_engines.tensorrt import rtx
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import require_dit
from pw_runtime.errors import BadRequest
from pw_runtime.execution.block_division import require_attention_engines, require_exact_attention
from pw_runtime.execution.compilers import COMPILERS, Compiler, CompilerName
from pw_runtime.execution.engine_records import built_elsewhere, step_ratio
from pw_runtime.execution.sparse_stage import kept_fraction, sparse_approximation
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.models.quantized_linear import approximation
from pw_runtime.presets import preset_name
from pw_runtime.system.places import check_cache, require_temporary_room
from pw_runtime.types import CHUNK, EnginePolicy, Preset, RunOptions, StageName

# Reasons why a network runs on its segments.
ASKED_FOR: Final = "asked for"
NONE_BUILT: Final = "no engine is built"

# Says how many times as fast as uncompiled the engines of some segments are, if that is known.
RatioOf = Callable[[Mapping[str, Segment], Mapping[str, Lookup]], float | None]
# Targets of TensorRT for RTX that it comes first for; data-centre GPUs are TensorRT's.
RTX_FIRST: Final = frozenset({"sm_86", "sm_89", "sm_120", "sm_121"})


def in_order(device: torch.device) -> tuple[CompilerName, ...]:
    """Return the compilers in the order in which they are tried for a device."""
    names = tuple(name for name in COMPILERS if device.type == "cpu" or name != "openvino")
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
    ratio: float | None = None  # how many times as fast as uncompiled, as `pw build` measured

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
        entry |= {"measured": f"{self.ratio:.2f}"} if self.ratio is not None else {}
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
    ratio = partial(step_ratio, config=config, linear=linear, tokens=tokens)
    engines = choose_engines(
        segments, options.policy, EngineStore(), device, command, ratio_of=ratio
    )
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
    ratio_of: RatioOf = lambda segments, files: None,
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
        ratio_of: see `find_engines`; with the policy "engines", slower ones are taken too.

    Raises:
        BadRequest: engines were asked for and are missing, or one cannot be opened.
    """
    reason = ASKED_FOR
    if policy != "eager":
        least = 0.0 if policy == "engines" else 1.0
        result = find_engines(lambda compiler: segments, store, device, command, ratio_of, least)
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
    ratio_of: RatioOf = lambda segments, files: None,
    least: float = 1.0,
) -> EngineSet | Unavailable:
    """Load the engines of the first compiler that has built all of them; on a CPU, the fastest.

    Args:
        segments_for: gives the segments, by name, that a compiler's engines are made from; none
            where it has no engines for the network.
        store: the engines on disk.
        device: the device that they run on.
        command: builds them.
        ratio_of: says how many times as fast as uncompiled some engines are, None if nobody
            measured.
        least: ratio below which engines are left out.

    Raises:
        BadRequest: an engine cannot be opened, the store's place is a file, or there is no room for
            temporary files.
    """
    check_cache(store.root)
    found: list[_Built] = []
    missing: dict[str, str] = {}
    for label in in_order(device):
        compiler = COMPILERS[label]
        segments = segments_for(compiler)
        if not segments:
            continue
        if reason := compiler.unavailable(device):
            # What cannot run on a CPU is for GPUs, unless engines of it are there.
            if device.type != "cpu" or built_elsewhere(store, segments, compiler, ()):
                missing[compiler.backend] = reason  # once for both front ends
            continue
        built = _built(store, label, segments, device)
        if isinstance(built, Unavailable):
            missing[label] = built.reason
            continue
        built = replace(built, ratio=ratio_of(segments, built.files))
        if built.ratio is not None and built.ratio < least:
            missing[label] = f"{label} engines are slower here: {built.ratio:.2f}x by `pw build`"
            continue
        found.append(built)
        if device.type != "cpu":
            break
    if found:  # the first of equals; what nobody measured counts as no faster
        fastest = max(found, key=lambda built: 1.0 if built.ratio is None else built.ratio)
        return _opened(fastest, store, device, command)
    told = {label: reason for label, reason in missing.items() if reason != NONE_BUILT}
    if device.type == "cpu":  # where two may build, what one of them lacks is no reason
        missing = told or {"": NONE_BUILT}
    reasons = list(missing.values())
    if len(reasons) > 1:
        reasons = [f"{label}: {reason}" for label, reason in missing.items()]
    return Unavailable("; ".join(reasons))


@dataclass(frozen=True, slots=True)
class _Built:
    """Engines of all segments of a network, by one compiler, in the store."""

    label: CompilerName
    segments: Mapping[str, Segment]
    keys: Mapping[str, EngineKey]
    files: Mapping[str, Lookup]
    ratio: float | None = None


def _built(
    store: EngineStore, label: CompilerName, segments: Mapping[str, Segment], device: torch.device
) -> _Built | Unavailable:
    """Look up a compiler's engines, and say what lacks."""
    compiler = COMPILERS[label]
    platforms = compiler.platforms(device)
    found = {
        name: _first(store, keys_of(segment, label, platforms))
        for name, segment in segments.items()
    }
    files = {name: file for name, (_, file) in found.items()}
    absent = [f"{name} ({file.reason})" for name, file in files.items() if file.path is None]
    if all(file.state == "missing" for file in files.values()):
        elsewhere = built_elsewhere(store, segments, compiler, platforms)
        return Unavailable(f"{elsewhere}: build them again" if elsewhere else NONE_BUILT)
    if absent:
        return Unavailable(f"no {', '.join(absent)}")
    return _Built(label, segments, {name: key for name, (key, _) in found.items()}, files)


def _opened(built: _Built, store: EngineStore, device: torch.device, command: str) -> EngineSet:
    """Open engines. Raises BadRequest where one cannot be opened, or without temporary room."""
    compiler, files = COMPILERS[built.label], built.files
    try:
        if compiler.backend == "aoti":  # which PyTorch unpacks before it opens them
            size = sum(file.path.stat().st_size for file in files.values() if file.path)
            require_temporary_room(2 * size + 16 * 2**20, "unpacking engines")
        engines = {
            name: _load(compiler, built.segments[name], file.path, device)
            for name, file in files.items()
        }
    except EngineError as error:
        raise BadRequest(
            f"an engine in {store.root} cannot be opened",
            got=error,
            do=f"run `pw engines prune --all` and `{command}`, or add --policy eager",
        ) from error
    except OSError as error:
        raise BadRequest(
            f"an engine in {store.root} is gone or cannot be read, after it was found there",
            got=error,
            do=f"run again; if that fails too, `{command}`, or add --policy eager",
        ) from error
    by = f", front end {compiler.frontend}" if compiler.frontend else ""
    digest = digest_of(built.keys[name].digest.encode() for name in sorted(built.keys))
    reason = f"built engines in {store.root}{by}"
    return EngineSet(built.segments, engines, compiler.backend, reason, digest, ratio=built.ratio)


def measured_ratios(
    segments: Mapping[str, Segment], store: EngineStore, device: torch.device, ratio_of: RatioOf
) -> dict[CompilerName, float]:
    """Return how many times as fast as uncompiled each compiler's engines of a network are.

    Those that are not all built, or not measured, are not in it.
    """
    ratios: dict[CompilerName, float] = {}
    for label in in_order(device):
        if COMPILERS[label].unavailable(device) is None:
            built = _built(store, label, segments, device)
            if isinstance(built, _Built) and (ratio := ratio_of(segments, built.files)):
                ratios[label] = ratio
    return ratios


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
