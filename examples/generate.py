# SPDX-License-Identifier: Apache-2.0
"""One clip: of the built-in model, or of a bundle that `pw convert` made.

python examples/generate.py "a small green box rises at night"
python examples/generate.py "a fox runs through snow" --model bundle-2k --preset 2k
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pw_export.bundle_cache import demo_bundle
from pw_runtime import Pipeline, Progress


def show(progress: Progress) -> None:
    """Print how far the clip is, on one line."""
    print(f"\r{progress.stage:8} {progress.fraction:4.0%}", end="", flush=True)


def main() -> None:
    """Make the clip of the command line's prompt."""
    parser = argparse.ArgumentParser(description="Make one clip.")
    parser.add_argument("prompt")
    parser.add_argument("--model", help="a bundle; default: the built-in model")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("clips/generate.mp4"))
    given = parser.parse_args()

    model = given.model or demo_bundle(print)
    with Pipeline.from_pretrained(model, preset=given.preset) as pipe:
        clip = pipe(given.prompt, seed=given.seed, output=given.out, callback=show)
    print(f"\n{clip.video}, and its receipt {clip.receipt}")


if __name__ == "__main__":
    main()
