# SPDX-License-Identifier: Apache-2.0
"""Clips with approximations beside exact ones: latents, frames, adherence to captions, CPU time.

    OMP_NUM_THREADS=1 pw bench approximations --model BUNDLE --preset PRESET --out NAME.json \
        --vary step_cache=0.05 --vary step_cache=0.05,linear=int8

Every variant makes the clip of a caption before the next caption's turn comes, from the same seeds,
in this process, networks loaded for each. CPU time is that of the process, all threads together.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.clips.compare import compare_pair
from pw_bench.e2e.aggregate import operations_of
from pw_bench.e2e.job import ClipFacts
from pw_bench.e2e.runtime_program import Silent, facts_of, operations_in
from pw_bench.measure.environment import envelope, identify
from pw_bench.quality.gate import TRUE, highres_of, mean, shares, true_video
from pw_bench.quality.measure import classify, sharpness
from pw_bench.quality.render import Example, examples
from pw_bench.result_sections import Attributes, Equivalence, Quality, Ratio, StepDifference
from pw_bench.result_sections import Variant as Seen
from pw_bench.results import Figure, Result
from pw_engines.engine import relative_l2
from pw_runtime import Prompt, Request, RunOptions, find_preset, generate
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.errors import BadRequest
from pw_runtime.job.receipt import read_receipt
from pw_runtime.planning.exactness import approximations
from pw_runtime.system.video_input import video_frames
from pw_runtime.types import Preset

EXACT: Final = "exact"
# The exact path: what every variant is compared with.
REFERENCE: Final = RunOptions(codec="ffv1", device="cpu", policy="eager", save_latents=True)
_OPTIONS: Final[TypeAdapter[RunOptions]] = TypeAdapter(RunOptions)
_EXTRAPOLATED: Final = re.compile(r"(\d+) of \d+ steps extrapolated")


@dataclass(slots=True)
class Made:
    """Figures of the clips of a variant, caption by caption."""

    seconds: list[float] = field(default_factory=list)  # of CPU time
    seen: list[Attributes] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)  # gradient energy
    extrapolated: list[int] = field(default_factory=list)  # steps
    facts: ClipFacts = field(default_factory=ClipFacts)  # of the last one


def parse_variant(text: str) -> RunOptions:
    """Return the options of a variant: "step_cache=0.05,linear=int8".

    Raises BadRequest where a name or a value is none, and where nothing is approximated.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    given: dict[str, Any] = {name.strip(): value.strip() for name, _, value in pairs}
    reference = {name: getattr(REFERENCE, name) for name in REFERENCE.__dataclass_fields__}
    try:
        options = _OPTIONS.validate_python(reference | given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise BadRequest(
            f"--vary {text} is no variant",
            got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            wanted="fields of RunOptions with values: step_cache=0.05,linear=int8",
        ) from error
    if not approximations(options):
        raise BadRequest(
            f"--vary {text} approximates nothing",
            wanted="an option that approximates, step_cache=0.05 for instance",
        )
    return options


def measure_approximations(
    model: Path,
    preset_name: str,
    variants: Sequence[str],
    *,
    clips: int,
    captions: int,
    say: Callable[[str], None],
) -> Result:
    """Measure variants beside the exact path.

    Args:
        model: bundle.
        preset_name: of the clips; with a high-res stage.
        variants: options that differ from the exact path, see `parse_variant`.
        clips: number of held-out captions whose latents and frames are compared.
        captions: number of held-out captions that the clips are held against; at least `clips`,
            or 0 for a model that has learned none.
        say: called with a line for every caption.

    Raises BadRequest, BadWeights, BadResult.
    """
    options = {EXACT: REFERENCE, **{text: parse_variant(text) for text in variants}}
    bundle, preset = open_bundle(model), find_preset(preset_name)
    if captions:
        highres_of(preset)  # refused now, not after all clips
    if 0 < captions < clips:
        raise BadRequest(
            "the clips that are compared are those of the first captions",
            got=f"--captions {captions} --clips {clips}",
            wanted="at least as many captions as clips, or none",
            do=f"give --captions {clips}, or --captions 0",
        )
    identity = identify(torch.device("cpu"))
    held_out = examples(max(clips, captions))
    made = {name: Made() for name in options}
    say("a first clip, to warm up")
    with TemporaryDirectory() as folder:
        first = {EXACT: REFERENCE}
        _make_clips(bundle, preset, held_out[0], first, {EXACT: Made()}, Path(folder))
    equivalence: list[Equivalence] = []
    for number, example in enumerate(held_out):
        say(f"caption {number + 1} of {len(held_out)}: {example.text}")
        with TemporaryDirectory() as folder:
            _make_clips(bundle, preset, example, options, made, Path(folder))
            if number < clips:
                for name in options:
                    if name != EXACT:
                        equivalence.append(clip_difference(name, Path(folder), name, example))
    figures = tuple(
        Figure(name=f"{name}/CPU time", unit="s", samples=tuple(one.seconds))
        for name, one in made.items()
    )
    scope = {
        "words": "clips with approximations beside exact ones in fp32",
        "preset": preset_name,
        "draft": f"{preset.draft.steps} steps",
        "clips compared": str(clips),
        "captions": str(captions),
        "precision": "fp32",
        "device": "cpu",
    }
    facts = {name: one.facts for name, one in made.items()}
    identity = replace(
        identity,
        weights={model.name: f"sha256:{bundle.digest}"},
        engines={
            f"{name}/{network}": engine
            for name, one in facts.items()
            for network, engine in one.engines.items()
        },
        operations=operations_of({name: one.operations for name, one in facts.items()}),
    )
    return replace(
        envelope("approximations", scope, identity),
        figures=figures,
        sides={name: _description(options[name], one) for name, one in made.items()},
        equivalence=tuple(equivalence),
        ratios=tuple(_ratios(made)),
        quality=_quality(preset, held_out, made) if captions else None,
    )


def _make_clips(
    bundle: Bundle,
    preset: Preset,
    example: Example,
    options: Mapping[str, RunOptions],
    made: Mapping[str, Made],
    folder: Path,
) -> None:
    """Make the clip of a caption by every variant, each in a folder of its name."""
    prompt = Prompt(example.text, str(example.position), example.position)
    for name, one in options.items():
        request = Request(prompts=(prompt,), preset=preset, out=folder / name, options=one)
        start = time.process_time()
        (outcome,) = generate(request, bundle, Silent(quiet=True))
        made[name].seconds.append(time.process_time() - start)
        assert outcome.video is not None, outcome.error
        clip = _pixels(outcome.video)
        made[name].seen.append(classify(clip))
        made[name].edges.append(sharpness(clip))
        receipt = read_receipt(outcome.video.with_suffix(".json"))
        made[name].facts = facts_of(receipt, operations_in(receipt, one))
        counts = (_EXTRAPOLATED.match(notice) for notice in receipt["notices"])
        made[name].extrapolated += [int(count[1]) for count in counts if count]


def _pixels(video: Path) -> Tensor:
    """Return the frames of a video, [3, F, height, width] in [-1, 1]."""
    frames = [torch.from_numpy(x.to_ndarray(format="rgb24")) for x in video_frames(video)]
    return torch.stack(frames).permute(3, 0, 1, 2) / 127.5 - 1


def clip_difference(side: str, folder: Path, name: str, example: Example) -> Equivalence:
    """Compare the clip of a caption, in the folder of a variant's name, with the exact one."""
    ours, reference = (folder / x / str(example.position) for x in (name, EXACT))
    frames = compare_pair(side, ours.with_suffix(".mkv"), reference.with_suffix(".mkv")).frames
    latents, expected = (load_file(f"{x}.latents.safetensors") for x in (ours, reference))
    steps = [
        StepDifference(
            stage=stage.removesuffix("_latent"),
            step=0,  # the last one of its stage
            cosine=torch.cosine_similarity(x.flatten(), expected[stage].flatten(), dim=0).item(),
            relative_l2=relative_l2(x, expected[stage]),
            max_abs=(x - expected[stage]).abs().max().item(),
        )
        for stage, x in latents.items()
        if stage.endswith("_latent")
    ]
    equal = frames.psnr is None and all(step.max_abs == 0 for step in steps)
    return Equivalence(
        side=side,
        against=EXACT,
        label="bit-exact" if equal else "approximate",
        limit=0.0,
        steps=tuple(steps),
        psnr=frames.psnr,
        ssim=frames.ssim,
        seam_index=frames.seam_index,
        flicker_ratio=frames.flicker_ratio,
    )


def _description(options: RunOptions, made: Made) -> str:
    """Describe a variant, and how many steps it extrapolated."""
    text = "; ".join(approximations(options)) or "the exact path"
    if not made.extrapolated:
        return text
    least, most = min(made.extrapolated), max(made.extrapolated)
    return f"{text}: {least} to {most} steps, {statistics.mean(made.extrapolated):.1f} on average"


def _ratios(made: Mapping[str, Made]) -> Iterator[Ratio]:
    """Yield the speed of every variant beside the exact path, by the medians of the captions."""
    exact = statistics.median(made[EXACT].seconds)
    for name, one in made.items():
        if name != EXACT:
            yield Ratio(side=name, against=EXACT, cpu_time=exact / statistics.median(one.seconds))


def _quality(preset: Preset, held_out: list[Example], made: Mapping[str, Made]) -> Quality:
    """Return how many captions the clips of each variant show."""
    scenes, config = [example.scene for example in held_out], highres_of(preset)
    true = Made()
    for scene in scenes:
        clip = true_video(scene, config, preset)
        true.seen.append(classify(clip))
        true.edges.append(sharpness(clip))
    return Quality(
        preset=preset,
        captions=tuple(example.text for example in held_out),
        expected=tuple(Attributes(x.colour, x.shape, x.motion) for x in scenes),
        variants=tuple(
            Seen(
                name=name,
                adherence=shares(one.seen, scenes),
                sharpness=mean(one.edges),
                seen=tuple(one.seen),
            )
            for name, one in {TRUE: true, **made}.items()
        ),
        reconstruction=(),
        from_true_drafts=(),
    )
