# SPDX-License-Identifier: Apache-2.0
"""Warnings where a clip is to have another size or length than the networks were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pw_runtime.types import Config, DitConfig, Preset, Request, StageConfig, StageName

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle

# Networks by dim, ffn_dim and num_layers of their drafts, and the presets they were trained for.
# The configs themselves are part of pw_export, which takes seconds to load.
Widths = tuple[int, int, int]
PUBLISHED: Final[Widths] = (3072, 14336, 30)
BUILT_IN: Final[Widths] = (256, 768, 4)
TRAINED_FOR: Final[Mapping[Widths, tuple[str, tuple[str, ...]]]] = MappingProxyType(
    {
        PUBLISHED: ("the published networks were", ("draft", "2k", "4k", "4k-5step")),
        BUILT_IN: (
            "the built-in model was",
            ("nano", "nano-hd", "nano-portrait", "nano-square"),
        ),
    }
)


def beyond_training(request: Request, bundle: Bundle) -> str | None:
    """Return the warning about a run, or None where there is none.

    Where the built-in model is asked for pictures much larger than it has learned, it has the time
    that a clip would take.

    Raises BadRequest where such a clip does not fit into memory.
    """
    from pw_runtime.presets import PRESETS

    config = bundle.networks.draft.config
    last = _last(request.stages)
    learned, largest = (_last(PRESETS[name].stages()) for name in ("nano", "nano-hd"))
    if _widths(config) != BUILT_IN or _pixels(last) <= _pixels(largest):
        return untrained(config, request.preset, draft_only=request.options.draft_only)
    return (
        f"warning: the built-in model has learned {_size(learned)}; a clip of "
        f"{_size(last)} takes about {_duration(request, bundle)} and shows little "
        "(--preset nano is its own)"
    )


def untrained(config: Config, preset: Preset, *, draft_only: bool) -> str | None:
    """Return the warning that networks were not trained on a preset's sizes or length.

    None where they were, and for networks of which that is not known.

    Args:
        config: of the draft network, by which the networks are recognised.
        preset: of the clip.
        draft_only: the clip shows the draft.
    """
    from pw_runtime.presets import PRESETS

    widths = _widths(config)
    if widths is None or widths not in TRAINED_FOR:
        return None
    model, names = TRAINED_FOR[widths]
    known = [PRESETS[name] for name in names]
    asked = _sizes(preset, draft_only=draft_only)
    alike = (x for x in known if x.video.frames == preset.video.frames)
    if any(_sizes(x, draft_only=draft_only) == asked for x in alike):
        return None
    drafts, clips = ([_sizes(x, draft_only=only)[-1] for x in known] for only in (True, False))
    clips = [clip for clip in clips if clip not in drafts]
    frames = preset.video.frames
    return (
        f"warning: a clip of {asked[-1]} with {frames} frame{'s' if frames > 1 else ''}"
        + "".join(f", from a draft of {size}," for size in asked[:-1])
        + f" is not what {model} trained on (drafts of {_listed(drafts)}, clips of "
        f"{_listed(clips)}, {known[0].video.frames} frames): how good it looks is not known"
    )


def _widths(config: Config) -> Widths | None:
    if not isinstance(config, DitConfig):
        return None
    return config.dim, config.ffn_dim, config.num_layers


def _sizes(preset: Preset, *, draft_only: bool) -> list[str]:
    return [_size(stage) for stage in preset.stages(draft_only=draft_only).values()]


def _listed(sizes: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(sizes))


def _size(stage: StageConfig) -> str:
    return f"{stage.width}x{stage.height}"


def _last(stages: Mapping[StageName, StageConfig]) -> StageConfig:
    return list(stages.values())[-1]


def _pixels(stage: StageConfig) -> int:
    return stage.width * stage.height


def _duration(request: Request, bundle: Bundle) -> str:
    """Estimate the time of one clip on this machine."""
    from pw_runtime.planning.candidates import candidates
    from pw_runtime.planning.planner import make_plan
    from pw_runtime.planning.stage_times import seconds_by_stage
    from pw_runtime.planning.time_estimate import measure_rates
    from pw_runtime.planning.workload import budget_of, everything, request_workload

    needed = everything(request)
    work = request_workload(bundle.networks, request, needed=needed)
    budget = budget_of(request.device, request.gpu_memory, request.host_memory)
    plan = make_plan(candidates(work, gpu=budget.device is not None, needed=needed), budget)
    rates = measure_rates(request.device, request.options.compute_precision)
    minutes = sum(seconds_by_stage(work, plan, rates).values()) / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"
