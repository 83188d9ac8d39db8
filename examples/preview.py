# SPDX-License-Identifier: Apache-2.0
"""One animated picture of several clips side by side, for a page or a chat.

python examples/preview.py outputs/demo/*.mp4 --out preview.webp --columns 3

The clips must have one size. Browsers play an animated WebP as they show a picture; it is repeated
without end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
from PIL import Image


def main() -> None:
    """Read the clips, draw each of their frames into one picture, write all of them."""
    parser = argparse.ArgumentParser(description="Show clips side by side in an animated WebP.")
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("preview.webp"))
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--quality", type=int, default=80, help="of the pictures, up to 100")
    given = parser.parse_args()

    clips, rate = zip(*map(read_clip, given.clips), strict=True)
    if len(sizes := {clip[0].size for clip in clips}) > 1:
        parser.error(f"the clips must have one size, and have {len(sizes)}: {sorted(sizes)}")
    width, height = clips[0][0].size
    columns = min(given.columns, len(clips))
    sheet = (columns * width, -(-len(clips) // columns) * height)
    frames = []
    for index in range(min(map(len, clips))):
        frame = Image.new("RGB", sheet)
        for place, clip in enumerate(clips):
            row, column = divmod(place, columns)
            frame.paste(clip[index], (column * width, row * height))
        frames.append(frame)
    frames[0].save(
        given.out,
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / rate[0]),  # milliseconds a frame
        loop=0,
        quality=given.quality,
        method=6,
    )
    print(f"{given.out}: {len(frames)} frames of {sheet[0]}x{sheet[1]}")


def read_clip(path: Path) -> tuple[list[Image.Image], float]:
    """Return the frames of a video and their number per second."""
    with av.open(path) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_image() for frame in container.decode(video=0)], float(rate)


if __name__ == "__main__":
    main()
