# SPDX-License-Identifier: Apache-2.0
"""Frames of a decoded video -> pixels as the model takes them: upright, cropped, scaled, in RGB.

libswscale is used for no more than to lay out the samples of a frame in planes. Each plane is then
scaled to the wanted size in floating point, by Pillow's Lanczos filter, which averages where it
shrinks; and the colours are computed from the scaled planes. So nothing is rounded on the way, the
depth of the samples may be up to 16 bits, and chroma is scaled once.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image
from torch import Tensor

from pw_runtime.errors import BadRequest

# Shares of red and blue in luma, by matrix (ITU-T H.273, table 4: PyAV has only some names).
_MATRICES: Final = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),
    5: (0.299, 0.114),  # BT.601
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
}
_BT709, _BT601, _UNSPECIFIED = 1, 5, 2
# As players have it where a file does not say: BT.709 from this size on, else BT.601.
_HD_WIDTH, _HD_HEIGHT = 1280, 577
_HDR: Final = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_UNREADABLE: Final = {
    ColorTrc.LINEAR: "linear",
    ColorTrc.LOG: "logarithmic",
    ColorTrc.LOG_SQRT: "logarithmic",
    ColorTrc.SMPTE428: "SMPTE 428",
}
_WIDE: Final = {
    ColorPrimaries.BT2020: "BT.2020",
    ColorPrimaries.SMPTE431: "DCI-P3",
    ColorPrimaries.SMPTE432: "Display P3",
}
_SUBSAMPLED: Final = {
    (1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (4, 4): "410", (1, 2): "440",
}  # fmt: skip
_DEPTHS: Final = (8, 9, 10, 12, 14, 16)


Turn = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Describe how the samples of a frame become a picture.

    Attributes:
        width: of the frame as it is stored, in samples.
        height: of the frame as it is stored, in samples.
        aspect: width of a sample divided by its height.
        turn: rows of a 2x2 matrix of -1, 0, 1, from stored to shown positions (x, y).
        layout: of planes that libswscale lays the samples out in.
        bits: of a sample.
        matrix: shares of red and blue in luma; None for samples that are RGB.
        full: luma uses the whole range of its bits.
        notices: for the user: what was assumed or left out.
    """

    width: int
    height: int
    aspect: Fraction
    turn: Turn
    layout: str
    bits: int
    matrix: tuple[float, float] | None
    full: bool
    notices: tuple[str, ...]

    @property
    def sideways(self) -> bool:
        """Tell whether rows are shown as columns."""
        return self.turn[0][0] == 0


def read_look(frame: av.VideoFrame, aspect: Fraction | None, turn: Turn, path: Path) -> Look:
    """Return how a frame is to be shown. Raises BadRequest for one that cannot be.

    Args:
        frame: decoded.
        aspect: of its samples, as the stream has it; None or 0: square.
        turn: of the video, from `read_turn`.
        path: of the file, for messages.
    """
    if frame.interlaced_frame:
        raise BadRequest(
            f"{path} is interlaced: each frame has the lines of two moments",
            do="deinterlace it first: ffmpeg -i IN -vf bwdif OUT",
        )
    notices = []
    if turn != ((1, 0), (0, 1)):
        notices.append("it is turned upright, as it says")
    if aspect and aspect != 1:
        notices.append(f"its pixels are {aspect.numerator}:{aspect.denominator}, and made square")
    if any(component.is_alpha for component in frame.format.components):
        notices.append("its transparency is ignored")
    layout, bits = _layout(frame, path)
    matrix = None
    if not layout.startswith("rgb"):
        matrix, assumed = _matrix(frame, path)
        notices += assumed
    _require_standard_range(frame, path)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if layout.startswith("gray") and frame.color_range == ColorRange.UNSPECIFIED:
        full = True  # as libswscale has it
        notices.append("it does not say the range of its greys: the full one is assumed")
    if wide := _WIDE.get(frame.color_primaries):  # type: ignore[call-overload]
        notices.append(f"its wide gamut, {wide}, is taken as that of BT.709: colours look paler")
    return Look(
        width=frame.width,
        height=frame.height,
        aspect=aspect or Fraction(1),
        turn=turn,
        layout=layout,
        bits=bits,
        matrix=matrix,
        full=full,
        notices=tuple(notices),
    )


def kept_share(look: Look, width: int, height: int) -> float:
    """Return the share of a frame that is left when it is cropped to a size."""
    left, top, right, bottom = _box(look, width, height)
    return (right - left) * (bottom - top) / (look.width * look.height)


def fitted(frame: av.VideoFrame, look: Look, width: int, height: int) -> Tensor:
    """Return a frame, upright, scaled to cover a size and cropped to it from the centre.

    Returns:
        [3, height, width] fp32 in [-1, 1].
    """
    size = (height, width) if look.sideways else (width, height)
    box = _box(look, width, height)
    scaled = [_scaled(plane, look, size, box) for plane in _planes(frame, look)]
    if look.matrix is None:
        colours = [plane / ((1 << look.bits) - 1) for plane in scaled]
    else:
        colours = _colours(scaled, look)
    shown = _turned(torch.stack(colours), look)
    return shown.mul(2).sub(1).clamp(-1, 1).contiguous()


def read_turn(frame: av.VideoFrame, path: Path) -> Turn:
    """Return the display matrix of a video, which its first frame has. Raises BadRequest.

    It is a quarter turn, a mirror, or both. Call it for one frame: PyAV keeps a frame whose side
    data was read until Python collects garbage.
    """
    found = frame.side_data.get(Type.DISPLAYMATRIX.name)
    if found is None:
        return (1, 0), (0, 1)
    # why not frame.rotation: of a mirrored frame it is half a turn
    matrix = struct.unpack("<9i", bytes(found))  # type: ignore[call-overload]
    a, b, _, c, d, *_ = (x / 2**16 for x in matrix)
    turn = (p, q), (r, s) = ((round(a), round(b)), (round(c), round(d)))
    square = abs(p) + abs(q) == abs(r) + abs(s) == abs(p * s - q * r) == 1
    if not square or max(abs(x - round(x)) for x in (a, b, c, d)) > 0.01:
        raise BadRequest(
            f"{path} is to be shown turned by no quarter, or distorted",
            got=f"display matrix {a:.2f} {b:.2f} {c:.2f} {d:.2f}",
            do="turn it upright first: ffmpeg -i IN OUT",
        )
    return turn


def _layout(frame: av.VideoFrame, path: Path) -> tuple[str, int]:
    """Return planes that hold the samples of a frame unchanged, and the bits of a sample."""
    pixel_format = frame.format
    bits = max(component.bits for component in pixel_format.components)
    if pixel_format.is_rgb or pixel_format.has_palette:
        return ("rgb24", 8) if bits <= 8 else ("rgb48le", 16)
    # why not is_chroma: of chroma that is as large as luma it is false
    chroma = [c for c in pixel_format.components if not c.is_alpha][1:]
    if bits not in _DEPTHS:
        raise _unknown_pixels(path, pixel_format.name)
    ending = "" if bits == 8 else f"{bits}le"
    if not chroma:
        return f"gray{ending}", bits
    factors = (round(frame.width / chroma[0].width), round(frame.height / chroma[0].height))
    if factors not in _SUBSAMPLED or (bits > 8 and factors in ((4, 1), (4, 4))):
        raise _unknown_pixels(path, pixel_format.name)
    return f"yuv{_SUBSAMPLED[factors]}p{ending}", bits


def _unknown_pixels(path: Path, name: str) -> BadRequest:
    return BadRequest(
        f"{path} has pixels of an unknown kind",
        got=name,
        wanted="RGB, grey or YUV of 8 to 16 bits",
        do="convert it first: ffmpeg -i IN -pix_fmt yuv420p OUT",
    )


def _matrix(frame: av.VideoFrame, path: Path) -> tuple[tuple[float, float], list[str]]:
    """Return the matrix of a frame's colours, and what is to be said where it was assumed."""
    named = frame.colorspace
    if len(frame.format.components) == 1:
        return _MATRICES[_BT709], []  # of grey, which has no colours
    if named == _UNSPECIFIED:
        large = frame.width >= _HD_WIDTH or frame.height >= _HD_HEIGHT
        name, named = ("BT.709", _BT709) if large else ("BT.601", _BT601)
        text = f"it does not say how its colours are coded: {name} is assumed, as for its size"
        return _MATRICES[named], [text]
    if named not in _MATRICES:
        raise BadRequest(
            f"{path} codes its colours in a way that is not read here",
            got=f"matrix {named} of ITU-T H.273",
            wanted="BT.601, BT.709 or BT.2020 with non-constant luminance",
            do="convert it first: ffmpeg -i IN -vf scale=out_color_matrix=bt709 OUT",
        )
    return _MATRICES[named], []


def _require_standard_range(frame: av.VideoFrame, path: Path) -> None:
    """Raise BadRequest for frames whose brightness is not coded as on a usual display."""
    if hdr := _HDR.get(frame.color_trc):  # type: ignore[call-overload]
        raise BadRequest(
            f"{path} is an HDR video, which the model has not learned",
            got=f"transfer function {hdr}",
            wanted="SDR",
            do="convert it first, for instance: ffmpeg -i IN -vf zscale=t=linear:npl=100,"
            "tonemap=hable,zscale=p=bt709:t=bt709:m=bt709,format=yuv420p OUT",
        )
    if other := _UNREADABLE.get(frame.color_trc):  # type: ignore[call-overload]
        raise BadRequest(
            f"{path} codes brightness in a way that is not read here",
            got=f"a {other} transfer function",
            wanted="that of BT.709, BT.601, sRGB or BT.2020",
            do="convert it first: ffmpeg -i IN -vf zscale=t=bt709 OUT",
        )


def _box(look: Look, width: int, height: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of what is left of a frame, in its samples."""
    if look.sideways:
        width, height = height, width
    shown = look.width * look.aspect
    scale = max(width / shown, Fraction(height, look.height))
    w, h = float(width / scale / look.aspect), float(height / scale)
    left, top = (look.width - w) / 2, (look.height - h) / 2
    return left, top, left + w, top + h


def _planes(frame: av.VideoFrame, look: Look) -> list[np.ndarray]:
    """Return the samples of a frame, [rows, columns] of each colour or of luma and chroma."""
    if frame.format.name != look.layout:
        # With the same matrix and range on both sides, samples of luma and chroma are only moved.
        frame = frame.reformat(
            format=look.layout,
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.JPEG,
        )
    dtype = np.uint8 if look.bits == 8 else np.dtype("<u2")
    found = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)  # type: ignore[call-overload]
        if look.layout.startswith("rgb"):
            colours = rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)
            found += [colours[..., i] for i in range(3)]
        else:
            found.append(rows[:, : plane.width])
    return found


def _scaled(
    plane: np.ndarray, look: Look, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Tensor:
    """Scale the part of a plane that a box in luma samples covers, [height, width] fp32.

    Columns of chroma are where every second column of luma is, its rows between two of luma: as
    MPEG-2 and all after it have it.
    """
    down = [round(look.height / plane.shape[0]), round(look.width / plane.shape[1])]
    offset = (1 - 1 / down[1]) / 2
    left, top, right, bottom = box
    inside = (left / down[1] + offset, top / down[0], right / down[1] + offset, bottom / down[0])
    samples = plane.astype(np.float32)
    if inside[2] > samples.shape[1]:  # by the half column that chroma is shifted
        samples = np.pad(samples, ((0, 0), (0, 1)), mode="edge")
    image = Image.fromarray(samples).resize(size, Image.Resampling.LANCZOS, box=inside)
    return torch.from_numpy(np.array(image))


def _colours(planes: list[Tensor], look: Look) -> list[Tensor]:
    """Return red, green and blue in [0, 1] of scaled luma and chroma (ITU-T H.273, section 8.3)."""
    step, most = float(1 << (look.bits - 8)), float((1 << look.bits) - 1)
    luma = planes[0] / most if look.full else (planes[0] - 16 * step) / (219 * step)
    if len(planes) == 1:
        return [luma, luma, luma]
    assert look.matrix is not None
    reach = most if look.full else 224 * step
    blue_chroma, red_chroma = ((plane - 128 * step) / reach for plane in planes[1:3])
    red_share, blue_share = look.matrix
    red = luma + 2 * (1 - red_share) * red_chroma
    blue = luma + 2 * (1 - blue_share) * blue_chroma
    green = (luma - red_share * red - blue_share * blue) / (1 - red_share - blue_share)
    return [red, green, blue]


def _turned(x: Tensor, look: Look) -> Tensor:
    """Turn [3, H, W] as it is to be shown."""
    (a, b), (c, d) = look.turn
    if look.sideways:
        x, across, down = x.transpose(1, 2), c, b
    else:
        across, down = a, d
    flipped = [dim for dim, sign in ((2, across), (1, down)) if sign < 0]
    return x.flip(flipped) if flipped else x
