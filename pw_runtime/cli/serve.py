# SPDX-License-Identifier: Apache-2.0
"""`pw serve`: a queue of clips behind an HTTP API, and a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.generate import generate
from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import FILE, FOLDER, MODEL, Bytes, PresetName, with_chosen_loras
from pw_runtime.cli.sizes import changed_preset, size_options
from pw_runtime.errors import BadRequest
from pw_runtime.system.packages import require_packages
from pw_runtime.types import LoraFile, Preset, RunOptions, StageName

# Options of `pw generate` that a server has too, and that mean the same.
SHARED: Final = (
    *("precision", "linear", "step_cache", "guidance_reuse", "sparse_attention", "vae_precision"),
    *("loras", "loras_highres"),
    *("gpu_memory", "host_memory", "kernels", "attention", "conv", "policy", "blocks", "chunk"),
)
TOKEN_VARIABLE: Final = "PW_SERVE_TOKEN"


@click.command()
@click.option("--model", type=MODEL, required=True, help="Bundle made by `pw convert`.")
@click.option(
    "--preset",
    "preset_names",
    type=PresetName(),
    multiple=True,
    required=True,
    help="A preset on offer, as for `pw generate`; may be repeated. The first is the default.",
)
@size_options
@click.option(
    "--root",
    type=FOLDER,
    required=True,
    help="Folder of the queue and of all videos; the server's alone.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; all but this machine's own need a token.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any."
)
@click.option(
    "--token-file",
    type=FILE,
    help=f"File with a line for each client: NAME TOKEN, or a token alone. [default: "
    f"${TOKEN_VARIABLE}, or no token]",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="auto, cpu, cuda or cuda:N; may be repeated: a worker on each. [default: auto]",
)
@click.option(
    "--max-queued",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Jobs that wait at most.",
)
@click.option(
    "--max-queued-per-client",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Jobs of one client that wait at most.",
)
@click.option(
    "--job-timeout",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds after which a running job is ended. [default: never]",
)
@click.option(
    "--keep-days",
    type=click.FloatRange(min=0, min_open=True),
    help="Remove finished jobs after this. [default: never]",
)
@click.option(
    "--keep-bytes",
    type=Bytes(),
    help="Remove the oldest finished jobs where all take more, 100GiB for instance. "
    "[default: never]",
)
@logging_options
def serve(**options: Any) -> int:
    """Serve clips over HTTP: an OpenAI-style video API, and a page at /."""
    require_packages(
        "`pw serve`", "fastapi", "uvicorn", "sqlalchemy", "prometheus-client", "python-multipart"
    )
    from pw_runtime.server.serve import serve as run
    from pw_runtime.server.settings import Limits, Settings
    from pw_runtime.system.progress import Reporter

    reporter = Reporter()
    days: float | None = options["keep_days"]
    limits = Limits(
        queued=options["max_queued"],
        queued_per_client=options["max_queued_per_client"],
        job_seconds=options["job_timeout"],
        keep_seconds=None if days is None else days * 86_400,
        keep_bytes=options["keep_bytes"],
    )
    model = _existing_model(options["model"])
    known = {field.name for field in fields(RunOptions)}
    settings = Settings(
        model=model,
        root=options["root"].absolute(),
        presets=_offered(options),
        devices=options["devices"] or ("auto",),
        options=RunOptions(**{name: options[name] for name in SHARED if name in known}),
        loras=_loras(model, options),
        gpu_memory=options["gpu_memory"],
        host_memory=options["host_memory"],
        host=options["host"],
        port=options["port"],
        tokens=_tokens(options["token_file"]),
        limits=limits,
    )
    ended_by = run(settings, reporter.warn)
    return DONE if ended_by is None else 128 + ended_by


serve.params += [option for option in generate.params if option.name in SHARED]


def _offered(options: Mapping[str, Any]) -> dict[str, Preset]:
    """Return presets by their names in the API: those of files without folder and ending.

    --size and --frames are for all of them.

    Raises BadRequest for two of one name.
    """
    from pw_runtime.presets import find_preset

    presets: dict[str, Preset] = {}
    for given in options["preset_names"]:
        name = Path(given).stem if given.lower().endswith(".toml") else given
        if name in presets:
            raise BadRequest(
                f"two presets have the name {name}",
                got=given,
                do="leave one out, or rename the file",
            )
        presets[name] = changed_preset(find_preset(given), options)
    return presets


def _existing_model(model: Path) -> Path:
    """Return the bundle's folder. Raises BadRequest where there is none."""
    if not (model / "bundle.json").is_file():
        raise BadRequest(
            f"{model} is not a bundle",
            got="no bundle.json in it" if model.is_dir() else "no such folder",
            do="make one with `pw convert`, or give its path",
        )
    return model.absolute()


def _loras(model: Path, options: Mapping[str, Any]) -> Mapping[StageName, tuple[LoraFile, ...]]:
    """Return the LoRAs of each network, once they have been checked. Raises BadWeights."""
    if not options["loras"] and not options["loras_highres"]:
        return {}  # without importing torch
    from pw_runtime.checkpoint.bundle import open_bundle

    chosen = with_chosen_loras(open_bundle(model), options).lora_files
    return {
        network: tuple(replace(lora, path=lora.path.absolute()) for lora in loras)
        for network, loras in chosen.items()
    }


def _tokens(file: Path | None) -> dict[str, str]:
    """Return client names by token. Raises BadRequest for a file that is unusable."""
    from pw_runtime.server.settings import parse_tokens
    from pw_runtime.system.input_files import UnreadableInput, read_text

    if file is None:
        text = os.environ.get(TOKEN_VARIABLE)
        return {} if text is None else parse_tokens(text, f"${TOKEN_VARIABLE}")
    try:
        return parse_tokens(read_text(file, 2**20), str(file))
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the tokens in {file}", got=error, do="check the path and the file"
        ) from error
