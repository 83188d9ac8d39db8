# SPDX-License-Identifier: Apache-2.0
"""Exit codes, parameter types and options that the verbs share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.errors import BadRequest, BadResult, WriteFailed
from pw_runtime.types import CHUNK, CHUNKS, Blocks, Codec, Conv, LinearFormat, LoraFile, Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Outcome


class NonEmptyPath(click.Path):
    """A path that is not empty: an empty one would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn the text of an option into a Path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class ModelPath(NonEmptyPath):
    """A path of a model, or its name in the local cache of Hugging Face's hub: ORG/NAME."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn the text of an option into the path that it means. Raises BadRequest."""
        from pw_runtime.system.hub_cache import find_model

        path = super().convert(value, param, ctx)
        return find_model(os.fspath(path))


class LoraParam(click.ParamType):  # type: ignore[type-arg]
    """A LoRA: FILE or FILE:SCALE."""

    name = "file[:scale]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> LoraFile:
        """Turn the text of an option into a file and a scale. Raises BadRequest."""
        from pw_runtime.checkpoint.lora_choice import parse_lora

        return value if isinstance(value, LoraFile) else parse_lora(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return files."""
        return [CompletionItem(incomplete, type="file")]


class PresetName(click.ParamType):  # type: ignore[type-arg]
    """The name of a preset in any case, or a preset file."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name as the presets have it; that of a file unchanged."""
        name = str(value)
        return name if Path(name).suffix or os.sep in name else name.strip().lower()

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the built-in presets that begin so, or where there are none, files."""
        from pw_runtime.presets import PRESETS

        known = [CompletionItem(name) for name in PRESETS if name.startswith(incomplete.lower())]
        return known or [CompletionItem(incomplete, type="file")]


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes: 24GiB, 24G, 512MiB; powers of two."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn the text of an option into bytes."""
        if isinstance(value, int):
            return value
        # Fifteen digits: more than any memory has bytes, and still a number that a float holds.
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if size <= 0:
            self.fail(f"invalid size {value!r}: expected e.g. 24GiB or 512MiB", param, ctx)
        return size


gpu_memory_option = click.option(
    "--gpu-memory", type=Bytes(), help="Maximum GPU memory. [default: what is free]"
)
host_memory_option = click.option(
    "--host-memory", type=Bytes(), help="Maximum host memory. [default: what is free]"
)
FOLDER = NonEmptyPath(path_type=Path)
FILE = NonEmptyPath(path_type=Path)
MODEL = ModelPath(path_type=Path)
CODECS = click.Choice(get_args(Codec))
PRECISIONS = click.Choice(get_args(Precision))

chunk_option = click.option(
    "--chunk",
    type=click.IntRange(*CHUNKS),
    default=CHUNK,
    show_default=True,
    help="Maximum tokens per engine call; must match between `pw build` and `pw generate`.",
)
blocks_option = click.option(
    "--blocks",
    type=click.Choice(get_args(Blocks)),
    default="segments",
    show_default=True,
    help="Division of a transformer block among engines: parts around our attention (segments), "
    "with attention as an engine of its own, or whole. The latter two are for TensorRT for RTX in "
    "bf16, and fit one preset.",
)
precision_option = click.option(
    "--precision",
    type=PRECISIONS,
    help="Precision of matrix products. [default: fp32 on a CPU, bf16 on a GPU]",
)
vae_precision_option = click.option(
    "--vae-precision",
    type=PRECISIONS,
    default="fp32",
    show_default=True,
    help="Precision of the decoder; bf16 halves its memory and is an approximation.",
)
linear_option = click.option(
    "--linear",
    type=click.Choice(get_args(LinearFormat)),
    default="exact",
    show_default=True,
    help="Format of the transformers' large linear layers; all but exact are approximations "
    "(`pw docs numerics`). Must match between `pw build` and `pw generate`.",
)
step_cache_option = click.option(
    "--step-cache",
    type=float,
    metavar="THRESHOLD",
    help="Extrapolate steps of the draft where its velocity changes by less than this, 0.05 for "
    "instance: an approximation (`pw docs numerics`). [default: compute every step]",
)
sparse_attention_option = click.option(
    "--sparse-attention",
    type=float,
    metavar="KEEP",
    help="Fraction of the blocks of keys, between 0 and 1, that self-attention of the high-res "
    "stage keeps; means stand for the others: an approximation (`pw docs numerics`). "
    "[default: exact]",
)
guidance_reuse_option = click.option(
    "--guidance-reuse",
    type=int,
    default=0,
    metavar="STEPS",
    help="Run no negative pass in this many high-res steps after the first, but take its distance "
    "from that: an approximation (`pw docs numerics`). [default: 0]",
)
conv_option = click.option(
    "--conv",
    type=click.Choice(get_args(Conv)),
    default="auto",
    show_default=True,
    help="Convolutions of the decoder on a CPU in fp32: winograd, in our C++, or onednn, the "
    "reference; they differ by rounding. auto: winograd wherever it can run.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value of a key of the preset, such as highres.steps=5; may be repeated.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on stdout instead (`pw docs json`).",
)
lora_option = click.option(
    "--lora",
    "loras",
    type=LoraParam(),
    multiple=True,
    help="LoRA for both transformers; may be repeated (`pw docs conditioning`). [default scale: 1]",
)
lora_highres_option = click.option(
    "--lora-highres",
    "loras_highres",
    type=LoraParam(),
    multiple=True,
    help="LoRA for the high-res transformer, in place of --lora; may be repeated. none: no LoRA.",
)
fragmented_option = click.option(
    "--fragmented",
    is_flag=True,
    help="Also write <id>.partial.mp4, playable while encoding; removed when <id>.mp4 is complete.",
)


trace_option = click.option(
    "--trace",
    type=FILE,
    help="Write a timeline to this file (Chrome trace format, for Perfetto).",
)


def with_chosen_loras(bundle: Bundle, options: Mapping[str, Any]) -> Bundle:
    """Return the bundle with the LoRAs of --lora and --lora-highres. Raises BadRequest, BadWeights.

    Those of a bundle with neither option are none.
    """
    both, highres = options["loras"], options["loras_highres"]
    if not both and not highres:
        return bundle
    from pw_runtime.checkpoint.lora_choice import choose_loras

    return choose_loras(bundle, both, own_loras(highres))


def own_loras(highres: Sequence[LoraFile]) -> list[LoraFile] | None:
    """Return the LoRAs of --lora-highres; None where the option was not given.

    `none` is the one name that is no file. Raises BadRequest where another one is named beside it.
    """
    none = LoraFile(Path("none"))
    if none in highres and len(highres) > 1:
        raise BadRequest(
            "--lora-highres none means no LoRA, and another one is named",
            got=", ".join(str(lora.path) for lora in highres),
            do="leave one of them out",
        )
    return [lora for lora in highres if lora != none] if highres else None


def traced(run: Callable[[], int], file: Path | None, device: torch.device) -> int:
    """Run `run`, and write a trace if `file` is given, also when the run fails."""
    if file is None:
        return run()
    from pw_runtime.system.atomic_files import require_replaceable
    from pw_runtime.system.trace import Trace

    require_replaceable(file)
    trace = Trace(device)
    try:
        with trace.recording():
            return run()
    finally:
        trace.write(file)


def exit_code(run: Callable[[], Sequence[Outcome]], reporter: Reporter) -> int:
    """Run `run`, name the prompts that failed, and return the exit code."""
    try:
        outcomes = run()
    except (WriteFailed, BadResult) as error:  # finished clips are kept
        reporter.warn(f"error: {error}")
        return SOME_FAILED
    failed = [outcome.prompt.id for outcome in outcomes if outcome.error is not None]
    if failed:
        reporter.warn(f"{len(failed)} of {len(outcomes)} prompts failed: {', '.join(failed)}")
    return SOME_FAILED if failed else DONE
