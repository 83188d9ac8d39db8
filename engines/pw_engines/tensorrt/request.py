# SPDX-License-Identifier: Apache-2.0
"""The request to a build process and its exit code, shared with its caller (`process`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pw_engines.spec import EngineSpec, TensorSpec
from pw_engines.tensorrt.library import LibraryName

PLAN: Final = "engine.plan"  # file of a build's folder: the result
LOG: Final = "builder.log"  # likewise: output of the builder's libraries, where it is redirected
REFUSED: Final = 3  # exit code: standard error is the message of an EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A plan to build: its spec, the model to build it from, and where to write it."""

    spec: EngineSpec
    model: Path  # an ONNX model, or a program written by torch.export.save at the spec's limits
    plan: Path  # to write
    device: int | None  # CUDA device; None for the process's default
    timing_cache: Path | None = None
    library: LibraryName = "tensorrt"
    targets: tuple[str, ...] = ()  # GPU architectures; empty: that of the device

    def to_json(self) -> str:
        """Serialise the request."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Request:
        """Read a request that `to_json` wrote."""
        data = json.loads(text)
        cache = data["timing_cache"]
        return Request(
            spec=_spec_from_json(data["spec"]),
            model=Path(data["model"]),
            plan=Path(data["plan"]),
            device=data["device"],
            timing_cache=None if cache is None else Path(cache),
            library=data["library"],
            targets=tuple(data["targets"]),
        )


def _spec_from_json(data: dict[str, Any]) -> EngineSpec:
    """Turn the lists of JSON back into tuples."""
    tensors = {
        name: tuple(TensorSpec(**{**x, "shape": tuple(x["shape"])}) for x in data[name])
        for name in ("inputs", "outputs")
    }
    pairs = {name: tuple(map(tuple, data[name])) for name in ("limits", "numbers")}
    return EngineSpec(**{**data, **tensors, **pairs})
