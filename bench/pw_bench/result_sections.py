# SPDX-License-Identifier: Apache-2.0
"""Sections of a results file that only some kinds of result have, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pw_runtime.system.trace import Span
from pw_runtime.types import Preset

Label = Literal["bit-exact", "rounding", "approximate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One implementation of one operation at one size; the figure of that name has its time."""

    figure: str
    op: str
    size: str
    implementation: str
    refused: str | None = None  # why it did not run
    error: float | None = None  # relative L2 to fp64 at the sampled rows
    error_ratio: float | None = None  # to the error of the baseline
    same_twice: bool | None = None
    finite: bool | None = None  # no NaN is left of those that memory was filled with
    rate: float | None = None  # FLOP/s or bytes/s, from the operation's minimum cost
    bound: Literal["flops", "bytes"] = "bytes"  # the ceiling that applies


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One clip made by one program, from prompt to closed video file.

    Attributes:
        side: program, for instance "ours" or "official".
        start: "cold" counts from starting the process, "warm" is a later clip of that process.
        wall: seconds.
        spans: in seconds from the start of the run.
        unattributed: seconds of the wall time outside all spans of the main thread.
        unattributed_shares: of the wall time, for every run of this program and start.
        host: (seconds from the start, resident bytes of the process).
        device: (seconds from the start, GPU bytes held by the process according to NVML).
        peaks: bytes by counter: "rss", "pss", "allocator", "nvml", and "reserved" for programs
            that do not reset that counter themselves.
        predicted: peak bytes by stage and place, from the plan; ours only.
        measured: the same as measured by the run itself.
        joules: GPU energy according to NVML.
        disk_bytes: written by the process.
    """

    side: str
    start: Literal["cold", "warm"]
    wall: float
    spans: tuple[Span, ...]
    unattributed: float
    unattributed_shares: tuple[float, ...]
    host: tuple[tuple[float, int], ...]
    device: tuple[tuple[float, int], ...] = ()
    peaks: Mapping[str, int]
    predicted: Mapping[str, Mapping[str, int]]
    measured: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    joules: float | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDifference:
    """A latent after one step, compared with the exact path's latent after the same step."""

    stage: str
    step: int
    cosine: float
    relative_l2: float
    max_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """Difference between the clips of two programs with the same weights, noise and texts.

    Attributes:
        side: program.
        against: program that it is compared with.
        label: class of the difference.
        limit: relative L2 of the last latent up to which the difference counts as rounding.
        psnr: dB over all frames; None where every byte is equal.
        ssim: mean over all frames.
        seam_index: gradient energy on tile borders over that elsewhere; None without tiles.
        flicker_ratio: mean change between frames over that of the other clip; None where the
            other clip is static.
    """

    side: str
    against: str
    label: Label
    limit: float
    steps: tuple[StepDifference, ...]
    psnr: float | None
    ssim: float
    seam_index: float | None
    flicker_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One program compared with another, or the reason why there is no ratio."""

    side: str
    against: str
    cold: float | None = None  # how many times as fast
    warm: float | None = None
    time: float | None = None
    cpu_time: float | None = None
    memory: float | None = None  # share of the other's peak
    tensors: float | None = None  # the same, counting tensors
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kills:
    """Runs that were killed, and went on.

    Attributes:
        kills: how many.
        processes: that were started, the killed ones included.
        batches: that were made in spite of them, all complete.
        files: of these batches, compared with those of a run that was not killed.
        altered: names of files that differ.
        killed_in: stage -> kills in it; "start" is before the first.
        again: stage -> steps, or frames of the decode, that were computed again after each kill.
    """

    kills: int
    processes: int
    batches: int
    files: int
    altered: tuple[str, ...]
    killed_in: Mapping[str, int]
    again: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """Difference between the tensors that two programs compute from the same inputs.

    Attributes:
        side: program.
        against: program that it is compared with.
        max_abs: largest absolute difference.
        unit: of `max_abs`, for instance "latent" or "levels of 255".
        relative_l2: None where the values are bytes.
        share: of values that differ at all; None where it was not counted.
    """

    side: str
    against: str
    max_abs: float
    unit: str
    relative_l2: float | None = None
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Attributes:
    """Colour, shape and motion visible in a clip; None where nothing could be made out."""

    colour: str | None
    shape: str | None
    motion: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One variant of the high-res stage, on held-out captions.

    Attributes:
        name: for instance "4 steps" or "no adapter".
        adherence: share of captions whose clip shows them, by attribute.
        sharpness: mean gradient energy of the clips.
        seen: attributes of the clips, caption by caption.
    """

    name: str
    adherence: Mapping[str, float]
    sharpness: float
    seen: tuple[Attributes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HardCaptions:
    """Objects found in the clips of held-out captions of one kind.

    Attributes:
        group: "tiny" or "pairs".
        variant: as of `Variant`.
        captions: how many.
        shares: of the objects that are "present", in the right "shape" and "motion", and of the
            "clip"s with all of that and no other object.
    """

    group: str
    variant: str
    captions: int
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Similarity of a variant's clips to the true renderings, clip by clip. PSNR is in dB."""

    name: str
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    mean_psnr: float
    mean_ssim: float
    sharpness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Adherence and detail of the built-in model's clips.

    Attributes:
        preset: sizes and sampler settings.
        captions: held-out texts.
        expected: what the captions say.
        variants: clips of the captions, by variant.
        reconstruction: true renderings through encoder and decoder, by size.
        from_true_drafts: high-res clips whose drafts are true renderings.
        fewer_steps: high-res clips in few steps, as like those in 16.
        hard_captions: captions of tiny shapes and of pairs, by variant.
    """

    preset: Preset
    captions: tuple[str, ...]
    expected: tuple[Attributes, ...]
    variants: tuple[Variant, ...]
    reconstruction: tuple[Likeness, ...]
    from_true_drafts: tuple[Likeness, ...]
    fewer_steps: tuple[Likeness, ...] = ()
    hard_captions: tuple[HardCaptions, ...] = ()
