# SPDX-License-Identifier: Apache-2.0
"""Our VAE decode beside diffusers' AutoencoderKLWan: time, memory and difference, on this CPU.

    pw bench vae-peers --out bench/results/NAME.json

The same random weights and latent in fp32, a process for every sample, the contenders in turns.
Their time ends with the values, ours with the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import torch
from torch import Tensor

from pw_bench.e2e.diffusers_networks import wan_autoencoder
from pw_bench.measure.environment import envelope, identify, usual_operations
from pw_bench.peers.subprocess_ab import Run, figures_of, ratios_of, run_in_turns, serve
from pw_bench.result_sections import OutputDifference
from pw_bench.results import Result
from pw_export.nano import NANO_VAE
from pw_runtime.checkpoint import keymaps
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.models import VaeDecoder
from pw_runtime.stages.decode import decode_frames
from pw_runtime.types import VAE_STRIDE, Compat, Latent, TilingConfig

DIFFUSERS: Final = "diffusers"
TILED: Final = "diffusers tiled"
OURS: Final = "ours"
# The scale of the latent is the caller's on their side: both decode it as it is.
CONFIG = replace(NANO_VAE, latent_mean=(0.0,) * 48, latent_std=(1.0,) * 48)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeWork:
    """Sizes of the clip in pixels and frames; `strips` is the number of bands in ours."""

    width: int
    height: int
    frames: int
    strips: int

    @property
    def latent(self) -> Tensor:
        """Random latent [48, T, h, w]."""
        t, h, w = VAE_STRIDE
        grid = ((self.frames - 1) // t + 1, self.height // h, self.width // w)
        return torch.randn(48, *grid, generator=torch.Generator().manual_seed(1))


def measure_vae_peers(work: VaeWork, rounds: int) -> Result:
    """Compare the decoders, with `rounds` samples of each."""
    cpu = torch.device("cpu")
    identity = identify(cpu, operations=usual_operations(cpu))
    trials = run_in_turns(__name__, (DIFFUSERS, TILED, OURS), work, rounds)
    figures = figures_of(trials)
    reference = to_bytes(trials[DIFFUSERS].output).int()
    scope = {
        "words": "decode of a random latent by the built-in model's decoder",
        "clip": f"{work.width}x{work.height}, {work.frames} frames",
        "strips": f"{work.strips} in ours",
        "precision": "fp32",
        "device": "cpu",
    }
    differences = []
    for name, trial in trials.items():
        if name == DIFFUSERS:
            continue
        difference = (to_bytes(trial.output).int() - reference).abs()
        differences.append(
            OutputDifference(
                side=name,
                against=DIFFUSERS,
                max_abs=float(difference.max()),
                unit="levels of 255",
                share=difference.ne(0).float().mean().item(),
            )
        )
    theirs = f"AutoencoderKLWan of diffusers ({version('diffusers')})"
    return replace(
        envelope("vae-peers", scope, identity),
        figures=figures,
        sides={
            DIFFUSERS: theirs,
            TILED: f"{theirs}, tiled",
            OURS: "this runtime's decode, in exact bands",
        },
        ratios=ratios_of(figures, OURS, (DIFFUSERS, TILED)),
        differences=tuple(differences),
    )


def prepare(contender: str, work: VaeWork) -> tuple[Run, Iterable[Tensor]]:
    """Return the decode of a contender, and the weights and inputs that it uses.

    Theirs returns the values, ours the bytes.
    """
    latent, theirs = work.latent, their_vae()
    if contender == OURS:
        ours = our_decoder(theirs)
        run = partial(our_decode, ours, latent, TilingConfig(strips=work.strips))
        return run, [latent, *ours.state_dict().values()]
    if contender == TILED:
        theirs.enable_tiling()
    return partial(their_decode, theirs, latent), [latent, *theirs.state_dict().values()]


def our_decode(net: VaeDecoder, latent: Tensor, tiling: TilingConfig) -> Tensor:
    """Decode to bytes [T, H, W, 3]."""
    chunks = decode_frames(net, Latent(x=latent), tiling, Compat())
    return torch.cat([chunk.frames for chunk in chunks])


def their_decode(net: Any, latent: Tensor) -> Tensor:
    """Decode to values [3, T, H, W] in [-1, 1]."""
    with torch.inference_mode():
        video: Tensor = net.decode(latent[None], return_dict=False)[0][0]
        return video


def their_vae() -> Any:
    """Return AutoencoderKLWan in the widths of the built-in model, with random weights."""
    torch.manual_seed(0)
    return wan_autoencoder(CONFIG).requires_grad_(False).eval()


def our_decoder(theirs: Any) -> VaeDecoder:
    """Return our decoder with their weights."""
    blocks = {"encoder_blocks": CONFIG.encoder_blocks, "decoder_blocks": CONFIG.decoder_blocks}
    weights = {
        keymaps.vae_from_diffusers(name, **blocks): x for name, x in theirs.state_dict().items()
    }
    net = VaeDecoder(CONFIG).requires_grad_(False)
    stored = {name: channels_last(weights[name]) for name in net.state_dict()}
    net.load_state_dict(stored, assign=True)
    return net


def to_bytes(output: Tensor) -> Tensor:
    """Convert any contender's output to frames [T, H, W, 3] in levels of 255."""
    if output.dtype == torch.uint8:
        return output
    return ((output.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 3, 0)


if __name__ == "__main__":
    serve(VaeWork, prepare)
