# SPDX-License-Identifier: Apache-2.0
"""Frames as bytes: kernels against references, references against definitions and libswscale."""

from __future__ import annotations

import av
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from pw_kernels import pack_frames, pack_yuv, unpatchify_pixels
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.op import OPS, using
from pw_kernels.pack_frames import reference as rgb_reference
from pw_kernels.pack_frames import run_kernel as rgb_kernel
from pw_kernels.pack_yuv import LAYOUTS, YuvLayout
from pw_kernels.pack_yuv import reference as yuv_reference
from pw_kernels.pack_yuv import run_kernel as yuv_kernel
from tests.kernels.test_vae_ops import values
from tests.oracle import vae as oracle

SHAPES = [(12, 1, 1, 1), (12, 2, 2, 5), (12, 2, 1, 86), (12, 1, 1, 550)]
# R, G, B in [0, 1] -> Y, U, V of 8 bits and of 10: ITU-R BT.709, limited range
COLOURS = {
    "black": ((0.0, 0.0, 0.0), (16, 128, 128), (64, 512, 512)),
    "white": ((1.0, 1.0, 1.0), (235, 128, 128), (940, 512, 512)),
    "grey": ((0.5, 0.5, 0.5), (126, 128, 128), (502, 512, 512)),
    "red": ((1.0, 0.0, 0.0), (63, 102, 240), (250, 409, 960)),
    "green": ((0.0, 1.0, 0.0), (173, 42, 26), (691, 167, 105)),
    "blue": ((0.0, 0.0, 1.0), (32, 240, 118), (127, 960, 471)),
}


def blocks_of(video: Tensor) -> Tensor:
    """[3, F, height, width] -> [12, F, height/2, width/2]."""
    return oracle.pixel_patchify(video[None])[0]


def blocks(shape: tuple[int, ...], order: str) -> Tensor:
    """Values past both ends, some of them at every half step of a byte."""
    x = values(*shape)
    steps = torch.arange(min(x[1].numel(), 511)) / 2
    x[1].view(-1)[: len(steps)] = steps / 255 * 2 - 1
    return x if order == "first" else x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def weight_of(shape: tuple[int, ...], weighted: bool) -> Tensor | None:
    return values(2 * shape[3], seed=1).abs() + 0.5 if weighted else None


def planes(packed: Tensor, layout: YuvLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Y, U and V of the first frame as whole numbers."""
    frame = packed[0].to(torch.int32)
    height, width = frame.shape[0] * 2 // 3, frame.shape[1]
    y, chroma = frame[:height], frame[height:].reshape(-1)
    parts = chroma.chunk(2) if layout == "yuv420p" else (chroma[::2], chroma[1::2])
    u, v = (x.reshape(height // 2, width // 2) for x in parts)
    return y, u, v


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rgb_kernel(shape: tuple[int, ...], order: str, truncate: bool, weighted: bool) -> None:
    x, weight = blocks(shape, order), weight_of(shape, weighted)
    got = rgb_kernel(x, weight, truncate)
    assert got.is_contiguous()
    assert torch.equal(got, rgb_reference(x, weight, truncate))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_yuv_kernel(shape: tuple[int, ...], order: str, layout: YuvLayout, weighted: bool) -> None:
    x, weight = blocks(shape, order), weight_of(shape, weighted)
    got = yuv_kernel(x, layout, weight)
    assert got.is_contiguous()
    assert torch.equal(got, yuv_reference(x, layout, weight))


def test_rgb_is_the_clamped_scaled_picture() -> None:
    """Against the definition: the spread picture, its blend, the official bytes."""
    x, weight = blocks((12, 2, 3, 5), "first"), weight_of((12, 2, 3, 5), True)
    for divided, given in ((x, None), (x, weight)):
        video = unpatchify_pixels(divided[None])[0]
        video = (video if given is None else video / given).clamp(-1, 1)
        scaled = (video + 1) / 2 * 255
        cut, rounded = (pack_frames(x, given, truncate=truncate) for truncate in (True, False))
        assert torch.equal(cut, scaled.to(torch.uint8).permute(1, 2, 3, 0))
        assert torch.equal(rounded, scaled.round().to(torch.uint8).permute(1, 2, 3, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_have_their_levels(colour: str, layout: YuvLayout) -> None:
    rgb, eight, ten = COLOURS[colour]
    video = torch.tensor(rgb).view(3, 1, 1, 1).expand(3, 1, 4, 6) * 2 - 1
    expected = [level * 64 for level in ten] if layout == "p010" else eight
    got = [plane.unique().tolist() for plane in planes(pack_yuv(blocks_of(video), layout), layout)]
    assert got == [[level] for level in expected]


def test_values_out_of_range_are_those_at_the_ends() -> None:
    video = values(3, 1, 8, 8) * 4
    for layout in LAYOUTS:
        clamped = pack_yuv(blocks_of(video.clamp(-1, 1)), layout)
        assert torch.equal(pack_yuv(blocks_of(video), layout), clamped)


def test_layouts_hold_the_same_samples() -> None:
    x = blocks((12, 1, 4, 6), "first")
    planar, pairs, ten = (planes(pack_yuv(x, layout), layout) for layout in LAYOUTS)
    for a, b, c in zip(planar, pairs, ten, strict=True):
        assert torch.equal(a, b)
        assert (c % 64 == 0).all()
        assert (c / 256 - a).abs().max() <= 0.5 + 1 / 8


def scaled(rgb: Tensor, interpolation: Interpolation) -> Tensor:
    """libswscale's yuv420p of one picture of bytes."""
    frame = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(rgb.numpy(), format="rgb24"),
        format="yuv420p",
        interpolation=interpolation,
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )
    return torch.from_numpy(frame.to_ndarray())[None]


@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_planes_are_those_of_libswscale(kind: str) -> None:
    """Within one level where libswscale averages areas too; its default, which takes four rows
    for chroma, gives that of a smooth picture."""
    y, x, colour = torch.meshgrid(*map(torch.arange, (128, 192, 3)), indexing="ij")
    smooth = 128 + 100 * torch.sin(x / (20 + 4 * colour)) * torch.cos(y / (16 + 3 * colour))
    noise = torch.rand(smooth.shape, generator=torch.Generator().manual_seed(0)) * 255
    rgb = (smooth if kind == "smooth" else noise).round().to(torch.uint8)
    video = rgb.permute(2, 0, 1)[:, None] / 127.5 - 1
    got = planes(pack_yuv(blocks_of(video), "yuv420p"), "yuv420p")
    area = planes(scaled(rgb, Interpolation.AREA), "yuv420p")
    default = planes(scaled(rgb, Interpolation.BILINEAR), "yuv420p")
    assert (got[0] - default[0]).abs().max() <= 1
    for ours, theirs in zip(got, area, strict=True):
        assert (ours - theirs).abs().max() <= 1
    if kind == "smooth":
        for ours, theirs in zip(got, default, strict=True):
            assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("width", [2560, 3840])
def test_true_sizes_give_one_and_a_half_bytes_a_pixel(width: int) -> None:
    height = {2560: 1440, 3840: 2144}[width]
    x = torch.empty((12, 4, height // 2, width // 2), device="meta")
    assert torch.ops.pw.pack_yuv(x, "yuv420p", None).shape == (4, height * 3 // 2, width)
    assert torch.ops.pw.pack_yuv(x, "p010", None).dtype == torch.uint16
    assert torch.ops.pw.pack_frames(x, None, False).shape == (4, height, width, 3)


OPCHECKED = {
    "pack_frames": lambda: (values(12, 2, 4, 6), None, True),
    "pack_frames weighted": lambda: (values(12, 2, 4, 6), values(12).abs() + 0.5, False),
    "pack_yuv": lambda: (values(12, 2, 4, 6), "yuv420p", None),
    "pack_yuv p010": lambda: (values(12, 2, 4, 6), "p010", values(12).abs() + 0.5),
}


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.pw, name.split()[0]).default
    torch.library.opcheck(operator, OPCHECKED[name]())


@pytest.mark.parametrize("name", ["pack_frames", "pack_yuv"])
def test_exported_graph_holds_plain_operations(name: str) -> None:
    class Packed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pack_yuv(x, "nv12") if name == "pack_yuv" else pack_frames(x, truncate=False)

    x = values(12, 2, 4, 6)
    program = torch.export.export(Packed(), (x,))
    assert not [node for node in program.graph.nodes if "pw." in str(node.target)]
    assert torch.equal(program.module()(x), Packed()(x))


def test_costs() -> None:
    x = torch.empty(12, 2, 2, 5)  # 240 values, 20 blocks, 120 samples
    rgb = OPS["pack_frames"].cost(x, None, False)
    assert (rgb.flops, rgb.bytes) == (6 * 240, 5 * 240)
    yuv = OPS["pack_yuv"].cost(x, "nv12", None)
    assert (yuv.flops, yuv.bytes) == (6 * 240 + 19 * 20 + 3 * 120, 240 * 4 + 120)
    assert OPS["pack_yuv"].cost(x, "p010", None).bytes == 240 * 4 + 240


BAD = {
    "twelve colours": (
        "pack_frames",
        lambda: pack_frames(values(3, 1, 2, 2), truncate=True),
        r"blocks \[12, F, H, W\], got \(3, 1, 2, 2\)",
    ),
    "blocks in bf16": (
        "pack_yuv",
        lambda: pack_yuv(values(12, 1, 2, 2).bfloat16(), "nv12"),
        "fp32, got torch.bfloat16",
    ),
    "no frames": (
        "pack_yuv",
        lambda: pack_yuv(values(12, 0, 2, 2), "nv12"),
        r"at least one block, got \(12, 0, 2, 2\)",
    ),
    "a weight of blocks": (
        "pack_yuv",
        lambda: pack_yuv(values(12, 1, 2, 2), "nv12", values(2)),
        r"weight \(4,\), got \(2,\)",
    ),
    "another layout": (
        "pack_yuv",
        lambda: pack_yuv(values(12, 1, 2, 2), "yuv444p"),  # type: ignore[arg-type]
        "one of the layouts yuv420p, nv12, p010, got yuv444p",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    name, call, message = BAD[case]
    with (
        using("triton"),
        dispatch_anywhere(),
        pytest.raises(ValueError, match=f"^pw::{name} expects {message}"),
    ):
        call()
