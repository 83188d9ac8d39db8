# SPDX-License-Identifier: Apache-2.0
"""Access to the golden tensors, which were computed with the official implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def load(name: str) -> dict[str, Tensor]:
    """Load all tensors of a golden set, which may be split into files `<name>-<i>-of-<n>`."""
    paths = sorted(
        [*GOLDEN.glob(f"{name}.safetensors"), *GOLDEN.glob(f"{name}-?-of-?.safetensors")]
    )
    return {key: tensor for path in paths for key, tensor in load_file(path).items()}


def load_json(name: str) -> Any:
    """Load the description of a golden set."""
    return json.loads((GOLDEN / f"{name}.json").read_text())
