#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# safetensors: the same tensors with the same metadata are not the same bytes.
#
# A good guess: saving is a pure function, so two saves of one dictionary give one file, and the
# file's digest can serve as a key or prove that nothing changed.
# What happens: with one metadata entry that holds; from two entries on, their order in the header
# changes from save to save, also within one process.
# Whom it hurts: content-addressed stores, caches keyed by a file's digest, reproducible releases,
# and tests that compare files. Compare tensors and metadata instead, or keep all metadata in one
# entry (as JSON).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import hashlib
from importlib.metadata import version

import numpy as np
from safetensors.numpy import save

print("safetensors", version("safetensors"))
tensors = {"x": np.arange(4, dtype=np.float32)}


def digests(metadata):
    return {hashlib.sha256(save(tensors, metadata)).hexdigest()[:12] for _ in range(50)}


one, two = digests({"format": "pt"}), digests({"format": "pt", "made_by": "somebody"})
print(f"50 saves with one metadata entry:   {len(one)} different file(s)")
print(f"50 saves with two metadata entries: {len(two)} different file(s)")
assert len(one) == 1
assert len(two) > 1, "the order of metadata has become stable"
PY
