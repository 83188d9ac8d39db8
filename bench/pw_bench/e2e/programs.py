# SPDX-License-Identifier: Apache-2.0
"""The programs that an end-to-end benchmark can run, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final

from pw_bench.e2e.job import Program

OURS: Final = "ours"
ENGINES: Final = "ours-engines"
EXACT: Final = OURS  # what the others' clips are compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A program to run: what it is in words, how it is made, what it needs."""

    what: str
    make: Callable[[], Program]
    highres: bool = True  # whether it can make the high-res stage
    package: str | None = None  # that must be installed
    gpu: bool = False  # whether it needs one


def _ours(**options: Any) -> Callable[[], Program]:
    def make() -> Program:
        from pw_bench.e2e.runtime_program import Ours

        return Ours(**options)

    return make


def _official() -> Program:
    from pw_bench.e2e.official_program import Official

    return Official()


def _diffusers() -> Program:
    from pw_bench.e2e.diffusers_program import Diffusers

    return Diffusers(compiled=False)


def _diffusers_compiled() -> Program:
    from pw_bench.e2e.diffusers_program import Diffusers

    return Diffusers(compiled=True)


SIDES: Final[Mapping[str, Side]] = MappingProxyType(
    {
        OURS: Side(what="this runtime, `pw generate --policy eager`", make=_ours()),
        ENGINES: Side(
            what="this runtime, its transformers on engines of `pw build`, "
            "`pw generate --policy engines`",
            make=_ours(policy="engines"),
        ),
        "ours-cudnn": Side(
            what="this runtime, `pw generate --policy eager --attention cudnn`",
            make=_ours(attention="cudnn"),
            gpu=True,
        ),
        "ours-triton": Side(
            what="this runtime, `pw generate --policy eager --kernels triton`",
            make=_ours(kernels="triton"),
            gpu=True,
        ),
        "official": Side(
            what="the official recipe, composed in eager PyTorch from its specification: "
            "modulation per token, texts padded to 512 rows, two passes a step one after the "
            "other, fp32 VAE in strips blended on the host, models kept between clips",
            make=_official,
        ),
        "diffusers": Side(
            what="WanPipeline of diffusers, eager, kept between clips",
            make=_diffusers,
            highres=False,
            package="diffusers",
        ),
        "diffusers-compiled": Side(
            what="WanPipeline of diffusers, its transformer and decoder by torch.compile",
            make=_diffusers_compiled,
            highres=False,
            package="diffusers",
        ),
    }
)


def told(name: str) -> str:
    """A program in words, with the version of the package that it is of."""
    side = SIDES[name]
    return side.what if side.package is None else f"{side.what} ({version(side.package)})"


def why_not(name: str, *, highres: bool, gpu: bool, in_memory: bool) -> str | None:
    """Why a program cannot take part; None where it can."""
    side = SIDES[name]
    if side.gpu and not gpu:
        return "it needs a CUDA GPU"
    if in_memory and (name == ENGINES or not name.startswith(OURS)):
        return "it reads its weights from files, and there are none"
    if side.package is not None and find_spec(side.package) is None:
        return f"{side.package} is not installed"
    if highres and not side.highres:
        return f"{side.package} has no high-res stage with adapter and step size"
    return None
