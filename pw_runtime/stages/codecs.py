# SPDX-License-Identifier: Apache-2.0
"""Codecs: their encoders and settings, and the checks to make before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import av

from pw_runtime.errors import BadRequest
from pw_runtime.system.machine import cpu_features
from pw_runtime.types import Codec, Compat, PixelFormat

Suffix = Literal[".mp4", ".mkv", ".png"]
VIDEOS: Final = (".mp4", ".mkv")
PICTURE: Final = ".png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of a codec: libavcodec's encoder, its options, the file.

    No encoder: a picture, which stages/picture.py writes.
    """

    encoder: str | None
    options: Mapping[str, str]
    pix_fmt: str = "yuv420p"
    suffix: Suffix = ".mp4"
    tag: str | None = None  # four-letter code, if the muxer's default does not play everywhere
    most: tuple[int, int] | None = None  # width and height that the encoder takes
    most_fps: int | None = None


# The number of threads is fixed: by default it follows the machine's cores, and with it change the
# stream of x264 and, up to threefold, the memory that an encoder takes.
# The crf of h264 is that of the official code. The others give the same luma PSNR on textured,
# grainy frames (45.1, 45.3 and 45.1 dB, with PyAV 18.1).
RECIPES: Final[Mapping[Codec, Recipe]] = MappingProxyType(
    {
        "h264": Recipe(
            encoder="libx264",
            options={"crf": "10", "preset": "veryfast", "threads": "4"},
            most=(16_384, 16_384),
        ),
        "hevc": Recipe(
            encoder="libx265",
            options={
                "crf": "10",
                "preset": "veryfast",
                "x265-params": "log-level=none:pools=4:frame-threads=2",
            },
            tag="hvc1",  # Apple's players refuse the default, hev1
        ),
        "av1": Recipe(
            encoder="libsvtav1",
            options={"crf": "8", "preset": "8", "svtav1-params": "lp=3"},
            most=(16_384, 8_704),
            most_fps=240,
        ),
        "ffv1": Recipe(
            encoder="ffv1",
            options={"level": "3", "slicecrc": "1", "threads": "4"},
            pix_fmt="bgr0",  # the only 8-bit RGB format of ffv1
            suffix=".mkv",
        ),
        "png": Recipe(encoder=None, options={}, pix_fmt="rgb24", suffix=".png"),
    }
)

# libx264 (core 165) in its AVX-512 code for the macroblock tree: where the width is no multiple of
# 128, one input has several streams, up to 11 levels apart once decoded, depending on what the heap
# held before. The AVX2 code has one stream and takes no longer. The names replace x264's own
# detection, so they may go only to a CPU that has all of them, as every CPU with AVX-512 does.
X264_WITHOUT_AVX512: Final = "asm=AVX2,FMA3,BMI2,LZCNT"


def encoder_options(recipe: Recipe) -> dict[str, str]:
    """Return the recipe's encoder options, complete for this CPU."""
    options = dict(recipe.options)
    if recipe.encoder == "libx264" and "avx512f" in cpu_features():
        options["x264-params"] = X264_WITHOUT_AVX512
    return options


def suffix(codec: Codec) -> Suffix:
    """Return the file name suffix of `codec`."""
    return RECIPES[codec].suffix


def pixel_format_for(codec: Codec, compat: Compat) -> PixelFormat:
    """Return the format to decode frames to: the encoder's own, so that they are rounded once.

    The official code truncates RGB bytes and lets libswscale convert them, so `truncating_uint8`
    asks for RGB.
    """
    planes = RECIPES[codec].pix_fmt == "yuv420p" and not compat.truncating_uint8
    return "yuv420p" if planes else "rgb24"


def check_limits(codec: Codec, *, width: int, height: int, fps: int) -> None:
    """Raise BadRequest for a size or a rate that a codec's encoder refuses when it is opened."""
    recipe, others = RECIPES[codec], "choose another --codec: hevc and ffv1 take it"
    if recipe.most is not None and (width > recipe.most[0] or height > recipe.most[1]):
        most = f"{recipe.most[0]}x{recipe.most[1]}"
        raise BadRequest(
            f"{recipe.encoder} takes no frames of this size",
            got=f"{width}x{height}",
            wanted=f"{most} at most",
            do=others,
        )
    if recipe.most_fps is not None and fps > recipe.most_fps:
        raise BadRequest(
            f"{recipe.encoder} takes no video of this rate",
            got=f"{fps} frames per second",
            wanted=f"{recipe.most_fps} at most",
            do=others,
        )


def check_codec(codec: Codec, *, frames: int, fragmented: bool = False) -> None:
    """Raise BadRequest if the installed PyAV cannot encode so many frames or fragment their file.

    Cheap: call it before anything is computed.
    """
    if fragmented and suffix(codec) != ".mp4":
        raise BadRequest(
            f"--fragmented needs an mp4, which {codec} does not produce",
            wanted=f"--codec {', '.join(c for c in RECIPES if suffix(c) == '.mp4')}",
            do="choose another codec, or omit --fragmented",
        )
    encoder = RECIPES[codec].encoder
    if encoder is None:
        if frames != 1:
            raise BadRequest(
                f"{codec} holds one frame",
                got=f"a clip of {frames} frames",
                do="add --frames 1, or choose another --codec: ffv1 is lossless",
            )
        return
    try:
        av.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise BadRequest(
            f"the installed PyAV cannot encode {codec}",
            got=f"av {av.__version__} without the encoder {encoder}",
            wanted=f"a build of av with {encoder}, such as its wheels on PyPI",
            do="pip install --force-reinstall --only-binary av av, or choose another codec",
        ) from error
