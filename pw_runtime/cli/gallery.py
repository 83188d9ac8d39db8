# SPDX-License-Identifier: Apache-2.0
"""`pw gallery` and `pw finish`: many drafts of a prompt, and those that are chosen at full size."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from pw_runtime.cli.generate import generate, make_clips
from pw_runtime.cli.options import FOLDER, PresetName
from pw_runtime.cli.request import read_request, request_of
from pw_runtime.cli.sizes import preset_of
from pw_runtime.errors import BadRequest
from pw_runtime.types import TilingConfig

if TYPE_CHECKING:
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Outcome, Preset, Request

MOST: Final = 1000  # drafts of a prompt
SHEET: Final = "gallery.png"
# Options of `pw generate` that these verbs do not have, and the values that they run with. All
# others are theirs too, and mean the same.
OF_GALLERY: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "draft_only": True,
        "save_latents": True,
        "contact_sheet": False,  # it has one of its own
        "drafts": None,
        "noise": None,
        "image_highres": False,
        "guidance_reuse": 0,
        "sparse_attention": None,
        "loras_highres": (),
    }
)
OF_FINISH: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "draft_only": False,
        "noise": None,
        "fast": False,
        # As the drafts were made with.
        **dict.fromkeys(("prompt_file", "image", "draft_video", "negative")),
        **dict.fromkeys(("precision", "linear", "step_cache", "kernels", "attention", "chunk")),
        "prompt_texts": (),
        "seed": 0,
        "draft_strength": 0.0,
    }
)
# Of the command that finishes a draft: as the draft was made with, where that was said.
_PASSED_ON: Final = ("model", "ckpt_dir", "lr_ckpt", "hr_ckpt", "device", "loras")


@click.command()
@click.option(
    "--count",
    type=click.IntRange(1, MOST),
    default=8,
    show_default=True,
    help="Drafts of each prompt.",
)
def gallery(count: int, **options: Any) -> int:
    """Make many drafts of each prompt, with a sheet of them all, to choose from.

    Draft N of a prompt has the id ID-N. `pw finish` makes those that are chosen at full size.
    """
    from pw_runtime.job.drafts import numbered_drafts

    def read(options: dict[str, Any], warn: Callable[[str], None]) -> Request:
        request = read_request(options, warn)
        if not request.options.draft_strength and any(x.draft_video for x in request.prompts):
            raise BadRequest(
                "every draft would be the same, the video itself",
                got="--draft-strength 0",
                do="add for instance --draft-strength 0.8, or go on from the video: `pw upscale`",
            )
        request = replace(request, prompts=numbered_drafts(request.prompts, count))
        _require_sheet(request)
        return request

    def then(request: Request, outcomes: Sequence[Outcome], reporter: Reporter) -> None:
        _show(request, outcomes, reporter, options)

    return make_clips("gallery", {**options, **OF_GALLERY}, read, then)


def _require_sheet(request: Request) -> None:
    """Raise BadRequest where the sheet of drafts would replace what is not of this run."""
    from pw_runtime.job.latents import SUFFIX
    from pw_runtime.system.atomic_files import require_replaceable

    sheet = request.out / SHEET
    if not os.path.lexists(sheet):
        return
    sources = {path.resolve() for prompt in request.prompts for path in prompt.sources.values()}
    if sheet.resolve() in sources:
        raise BadRequest(
            f"the sheet of drafts would replace {sheet}, which drafts start from",
            do="choose another --out",
        )
    require_replaceable(sheet)
    drafts = {x.name.removesuffix(SUFFIX) for x in request.out.glob(f"*{SUFFIX}")}
    drafts = {name for name in drafts if re.fullmatch(r".+-\d+", name)}  # as galleries name them
    others = sorted(drafts - {prompt.id for prompt in request.prompts})
    if others and not request.overwrite:
        raise BadRequest(
            f"{sheet} is of an earlier gallery, and would show the drafts of this run alone",
            got=f"{request.out} with {', '.join(others[:8])}" + ", ..." * (len(others) > 8),
            do="choose another --out, or --overwrite replaces the sheet",
        )


def _show(
    request: Request, outcomes: Sequence[Outcome], reporter: Reporter, options: dict[str, Any]
) -> None:
    """Write the sheet, and tell the command that finishes each draft. Raises WriteFailed."""
    from pw_runtime.job.drafts import write_gallery

    made = [(x.prompt, x.video) for x in outcomes if x.video is not None]
    if not made:
        return
    sheet = request.out / SHEET
    write_gallery(made, sheet)
    reporter.say(f"all drafts: {sheet}")
    words = ["--drafts", str(request.out), *_given(options)]
    if request.preset.highres is None:
        words += ["--preset", *_finishing(request.preset)]
    reporter.say("to finish a draft:")
    for prompt, _ in made:
        named = [*words, "--", prompt.id] if prompt.id.startswith("-") else [prompt.id, *words]
        reporter.say(f"  {shlex.join(['pw', 'finish', *named])}")


def _finishing(preset: Preset) -> list[str]:
    """Return the words after --preset that name one with these drafts and a high-res stage."""
    from pw_runtime.presets import PRESETS, UNNAMED

    frames = preset.video.frames

    def drafts(preset: Preset) -> Preset:
        video = replace(preset.video, frames=frames)
        return replace(preset, highres=None, decode=TilingConfig(), video=video)

    for name, known in PRESETS.items():
        if known.highres and drafts(known) == drafts(preset):
            return [name, *(["--frames", str(frames)] if known.video.frames != frames else [])]
    return [UNNAMED]


def _given(options: dict[str, Any]) -> list[str]:
    """Return the options of this command line that the one which finishes a draft needs too."""
    context, words = click.get_current_context(), []
    for option in context.command.params:
        named = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if option.name in _PASSED_ON and named:
            value = options[option.name]
            for one in value if option.multiple else (value,):
                words += [option.opts[0], str(one)]
    return words


@click.command()
@click.argument("drafts", metavar="ID...", nargs=-1, required=True)
@click.option(
    "--drafts",
    "folder",
    type=FOLDER,
    help="Folder of the drafts. [default: none; then ID is the path of a latents file]",
)
@click.option(
    "--out", "--video_dir", type=FOLDER, help="Output folder. [default: `finished` beside drafts]"
)
@click.option(
    "--preset",
    "--resolution",
    type=PresetName(),
    help="A preset with the same drafts. [default: that of the drafts, where it has a high-res "
    "stage]",
)
def finish(drafts: tuple[str, ...], folder: Path | None, **options: Any) -> int:
    """Make drafts of `pw gallery`, or of `pw generate --draft-only --save-latents`, at full size.

    Prompt, seed, negative prompt and options of the draft come from its file: the clip is the one
    that a direct run would have made, bit for bit.
    """

    def read(options: dict[str, Any], warn: Callable[[str], None]) -> Request:
        from pw_runtime.job.checks import pick_device
        from pw_runtime.job.drafts import DECIDED, read_drafts

        found = read_drafts(drafts, folder)
        earlier, device = found.origin.options, pick_device(options["device"])
        options = options | {name: getattr(earlier, name) for name in DECIDED}
        started = any(x.image or x.draft_video for x in found.prompts)
        if started and options["conv"] == "auto" and device.type == "cpu":
            options["conv"] = earlier.conv  # it encoded what the drafts start from
        options |= {
            "drafts": found.folder,
            "seed": found.origin.seeds["base"],
            "negative": found.origin.negative,
            "out": options["out"] or found.folder / "finished",
        }
        preset = _preset(options, found.preset)
        return request_of(options, found.prompts, preset, device)

    return make_clips("finish", {**options, **OF_FINISH}, read)


def _preset(options: dict[str, Any], made_for: Preset) -> Preset:
    """Return the preset of the clips. Raises BadRequest where there is none with a high-res stage.

    Args:
        options: of `pw finish`.
        made_for: preset of the drafts.
    """
    if options["preset"] is not None:
        return preset_of(options)
    if given := [x for x in ("changes", "size", "frames") if options[x] not in (None, ())]:
        option = given[0].replace("changes", "set")
        raise BadRequest(f"--{option} changes a preset, and none is named", do="add --preset NAME")
    if made_for.highres is None:
        raise BadRequest(
            "the preset of the drafts has no high-res stage",
            do="add --preset: 2k and 4k have the drafts of `draft`",
        )
    return made_for


for verb, left_out in ((gallery, OF_GALLERY), (finish, OF_FINISH)):
    known = {*left_out, *(option.name for option in verb.params), *(["drafts"] * (verb is finish))}
    verb.params += [option for option in generate.params if option.name not in known]
