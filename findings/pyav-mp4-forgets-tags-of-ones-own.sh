#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# PyAV: what an mp4 keeps of its container's metadata depends on the key, and nothing is said.
#
# A good guess: `container.metadata["seed"] = "42"` is in the file, or is refused.
# What happens: in .mp4 title, comment and description stay, seed and prompt are gone; in .mov the
# description is gone as well; .mkv keeps all, and has all but the title in capitals. With
# movflags=use_metadata_tags the mp4 keeps all of them.
# Whom it hurts: whoever writes prompt, seed or settings of a generated clip into the clip. Ours are
# JSON in the comment.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
cat > "$work/tags.py" <<'PY'
import sys

import av
import numpy as np

TAGS = {"title": "t", "comment": "c", "description": "d", "seed": "42", "prompt": "a fox"}


def kept(path, **options):
    """Write a short clip with the tags; return which of them are read back, and how spelt."""
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.metadata.update(TAGS)
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(black))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        found = container.metadata
        return [key for key in found if key.lower() in TAGS and found[key] == TAGS[key.lower()]]


folder = sys.argv[1]
print("PyAV", av.__version__)
results = {
    "mp4": kept(f"{folder}/a.mp4"),
    "mp4, use_metadata_tags": kept(f"{folder}/b.mp4", movflags="use_metadata_tags"),
    "mov": kept(f"{folder}/a.mov"),
    "mkv": kept(f"{folder}/a.mkv"),
}
for name, keys in results.items():
    print(f"  {name}: {', '.join(sorted(keys))}")
assert sorted(results["mp4"]) == ["comment", "description", "title"], results
assert sorted(results["mp4, use_metadata_tags"]) == sorted(TAGS), results
assert sorted(results["mov"]) == ["comment", "title"], results
assert {"SEED", "PROMPT"} <= set(results["mkv"]), results
PY
"$work/venv/bin/python" "$work/tags.py" "$work"
