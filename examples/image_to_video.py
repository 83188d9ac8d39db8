# SPDX-License-Identifier: Apache-2.0
"""A clip that begins with a picture.

python examples/image_to_video.py picture.png "a big red ball drifts to the right over a meadow"
python examples/image_to_video.py photo.jpg "a boat sails away" --model bundle-2k --preset 2k
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pw_export.bundle_cache import demo_bundle
from pw_runtime import Pipeline


def main() -> None:
    """Make the clip of a picture and a prompt."""
    parser = argparse.ArgumentParser(description="Make a clip that begins with a picture.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--model", help="a bundle; default: the built-in model")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--out", type=Path, default=Path("clips/from_picture.mp4"))
    given = parser.parse_args()

    model = given.model or demo_bundle(print)
    with Pipeline.from_pretrained(model, preset=given.preset) as pipe:
        clip = pipe(given.prompt, image=given.picture, output=given.out)
    print(f"{clip.video}, and its receipt {clip.receipt}")


if __name__ == "__main__":
    main()
