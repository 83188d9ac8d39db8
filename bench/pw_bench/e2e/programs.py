# SPDX-License-Identifier: Apache-2.0
"""The programs that an end-to-end benchmark can run, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final

from pw_bench.choices import ENGINES, FAST, OURS, SPARSE, ProgramName
from pw_bench.e2e.job import Program
from pw_runtime.system.packages import pip_install

REFERENCE: Final = OURS  # the others' clips are compared with its clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A program that can take part: description, constructor, requirements."""

    description: str
    make: Callable[[], Program]
    highres: bool = True  # whether it can make the high-res stage
    package: str | None = None  # that must be installed
    gpu: bool = False  # whether it needs one


def _ours(**options: Any) -> Callable[[], Program]:
    def make() -> Program:
        from pw_bench.e2e.runtime_program import RuntimeProgram

        return RuntimeProgram(**options)

    return make


def _official() -> Program:
    from pw_bench.e2e.official_program import OfficialProgram

    return OfficialProgram()


def _diffusers(*, compiled: bool) -> Callable[[], Program]:
    def make() -> Program:
        from pw_bench.e2e.diffusers_program import DiffusersProgram

        return DiffusersProgram(compiled=compiled)

    return make


CONTENDERS: Final[Mapping[ProgramName, Contender]] = MappingProxyType(
    {
        OURS: Contender(description="this runtime, `pw generate --policy eager`", make=_ours()),
        ENGINES: Contender(
            description="this runtime, its transformers on engines of `pw build`, "
            "`pw generate --policy engines`",
            make=_ours(policy="engines"),
        ),
        "ours-reference": Contender(
            description="this runtime, `pw generate --policy eager --kernels reference`",
            make=_ours(kernels="reference"),
            gpu=True,
        ),
        "ours-cudnn": Contender(
            description="this runtime, `pw generate --policy eager --kernels reference "
            "--attention cudnn`",
            make=_ours(kernels="reference", attention="cudnn"),
            gpu=True,
        ),
        "ours-triton": Contender(
            description="this runtime, `pw generate --policy eager --kernels triton`",
            make=_ours(kernels="triton"),
            gpu=True,
        ),
        FAST: Contender(
            description="this runtime, `pw generate --policy eager --fast`: approximations",
            make=_ours(fast=True),
        ),
        SPARSE: Contender(
            description="this runtime, `pw generate --policy eager --sparse-attention 0.5`: an "
            "approximation",
            make=_ours(sparse_attention=0.5),
        ),
        "official": Contender(
            description="the official recipe, composed in eager PyTorch from its specification: "
            "modulation per token, texts padded to 512 rows, two passes a step one after the "
            "other, fp32 VAE in strips blended on the host, models kept between clips",
            make=_official,
            package="transformers",  # for its tokenizer, as in the official code
        ),
        "diffusers": Contender(
            description="WanPipeline of diffusers, eager, kept between clips",
            make=_diffusers(compiled=False),
            highres=False,
            package="diffusers",
        ),
        "diffusers-compiled": Contender(
            description="WanPipeline of diffusers, its transformer and decoder by torch.compile",
            make=_diffusers(compiled=True),
            highres=False,
            package="diffusers",
        ),
    }
)


def describe(name: ProgramName) -> str:
    """Describe a program, with the version of the package that it comes from."""
    contender = CONTENDERS[name]
    if contender.package is None:
        return contender.description
    return f"{contender.description} ({contender.package} {version(contender.package)})"


def why_unavailable(name: ProgramName, *, highres: bool, gpu: bool, in_memory: bool) -> str | None:
    """Return the reason why a program cannot take part; None where it can."""
    contender = CONTENDERS[name]
    if contender.gpu and not gpu:
        return "it needs a CUDA GPU"
    if in_memory and (name == ENGINES or not name.startswith(OURS)):
        return "it reads its weights from files, and there are none"
    if contender.package is not None and find_spec(contender.package) is None:
        return f"{contender.package} is not installed: {pip_install(contender.package)}"
    if highres and not contender.highres:
        return f"{contender.package} has no high-res stage with adapter and step size"
    return None
