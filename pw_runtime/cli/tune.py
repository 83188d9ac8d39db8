# SPDX-License-Identifier: Apache-2.0
"""`pw tune`: measure the implementations of attention on this GPU, before a run does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.options import MODEL, PresetName, device_option, set_option
from pw_runtime.cli.sizes import preset_of, size_options

if TYPE_CHECKING:
    from pw_runtime.sizes import Size


@click.command()
@click.option("--model", type=MODEL, help="Bundle made by `pw convert`. [default: published sizes]")
@click.option("--preset", type=PresetName(), required=True, help="As for `pw generate`.")
@set_option
@size_options
@click.option("--draft-only", is_flag=True, help="As for `pw generate`.")
@click.option("--again", is_flag=True, help="Measure also where an earlier measurement is kept.")
@device_option
def tune(
    model: Path | None,
    preset: str,
    changes: tuple[str, ...],
    size: Size | Literal["picture"] | None,
    frames: int | None,
    draft_only: bool,
    again: bool,
    device: str,
) -> int:
    """Measure attention on this GPU and keep the fastest; `pw generate` does it where needed."""
    from pw_export.wan22_configs import NETWORKS
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.errors import BadRequest
    from pw_runtime.job.checks import pick_device
    from pw_runtime.job.kernel_choice import measured_attention

    picked = pick_device(device)
    if picked.type != "cuda":
        raise BadRequest(
            "`pw tune` measures a GPU: a CPU always runs the reference",
            got=f"device {picked}",
            do="run it on the machine with the GPU; `pw doctor` says what PyTorch finds",
        )
    networks = NETWORKS if model is None else open_bundle(model).networks
    given = {"preset": preset, "changes": changes, "size": size, "frames": frames}
    chosen = preset_of(given)
    stages = chosen.stages(draft_only=draft_only)
    stage = max(stages, key=lambda name: stages[name].tokens(chosen.video))
    network = networks.draft if stage == "draft" else networks.highres
    if network is None:
        raise BadRequest(
            f"{model} has no {stage} network",
            do="add --draft-only, or convert it again with --highres",
        )
    tokens = stages[stage].tokens(chosen.video)
    measured = measured_attention(picked, tokens, network.config, click.echo, again=again)
    for trial in measured.trials:
        words = trial.refused or ""
        if trial.seconds is not None:
            words = f"{1e3 * trial.seconds:8.2f} ms   error {trial.error:.1e}   {words}".rstrip()
        click.echo(f"{trial.implementation:<14}{words}")
    click.echo(f"--attention auto is {measured.choice} at {tokens:,} tokens")
    return DONE
