# SPDX-License-Identifier: Apache-2.0
"""--size and --frames: a preset's clip in another size or length."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import click

from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    from pw_runtime.sizes import Size
    from pw_runtime.types import Preset

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)
PICTURE: Final = "picture"  # in place of a size: that of the picture
_SIZE: Final = re.compile(r"(\d{1,6})\s*[x×*]\s*(\d{1,6})", re.IGNORECASE)
# Keys of a preset that each option decides.
_DECIDES: Final[Mapping[str, tuple[str, ...]]] = {
    "size": ("draft.width", "draft.height", "highres.width", "highres.height"),
    "frames": ("video.frames",),
}


class SizeText(click.ParamType):  # type: ignore[type-arg]
    """Width and height in pixels, 1440x2560, or the word `picture`."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Size | Literal["picture"]:
        """Turn the text of an option into width and height. Raises BadRequest for bad numbers."""
        from pw_runtime.sizes import require_size

        if isinstance(value, tuple):
            return value
        text = str(value).strip().lower()
        if text == PICTURE:
            return PICTURE
        match = _SIZE.fullmatch(text)
        if match is None:
            self.fail(f"{value!r} is no size: expected e.g. 1440x2560, or picture", param, ctx)
        size = int(match[1]), int(match[2])
        require_size(size)
        return size


def size_options(command: Command) -> Command:
    """Add --size and --frames to a command that has --preset and --set."""
    size = click.option(
        "--size",
        type=SizeText(),
        metavar="WxH",
        help="Size of the clip in pixels, multiples of 32; the draft gets the same shape. "
        "picture: as suits the picture or video of the prompts. [default: the preset's]",
    )
    frames = click.option(
        "--frames", type=int, help="Length of the clip, 4n+1 frames. [default: the preset's]"
    )
    return size(frames(command))


def preset_of(
    options: Mapping[str, Any], picture_size: Callable[[Preset], Size] | None = None
) -> Preset:
    """Return the preset of --preset, with what --set, --size and --frames change.

    Args:
        options: of the command.
        picture_size: returns the size that suits the pictures of the prompts, where it has prompts.

    Raises BadRequest.
    """
    from pw_runtime.presets import find_preset

    _require_decided_once(options)
    preset = find_preset(options["preset"], options["changes"])
    return changed_preset(preset, options, picture_size)


def changed_preset(
    preset: Preset,
    options: Mapping[str, Any],
    picture_size: Callable[[Preset], Size] | None = None,
) -> Preset:
    """Return a preset with what --size and --frames change. Raises BadRequest."""
    from pw_runtime.sizes import sized, with_frames

    size, frames = options["size"], options["frames"]
    if frames is not None:
        preset = with_frames(preset, frames)
    if size == PICTURE:
        if picture_size is None:
            raise BadRequest(
                "--size picture needs prompts with pictures, and this command has none",
                do="name the size: --size 1440x2560 for instance",
            )
        size = picture_size(preset)
    return preset if size is None else sized(preset, size)


def _require_decided_once(options: Mapping[str, Any]) -> None:
    """Raise BadRequest where --set names what --size or --frames decides."""
    for change in options["changes"]:
        key = change.partition("=")[0].strip()
        for option, keys in _DECIDES.items():
            if options[option] is not None and key in keys:
                raise BadRequest(
                    f"--{option} and --set {key} contradict each other",
                    got=f"--set {change}",
                    do="leave one of them out; --set alone can give every key a value of its own",
                )
