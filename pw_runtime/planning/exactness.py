# SPDX-License-Identifier: Apache-2.0
"""The label of a clip: exact, rounding or approximate, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pw_runtime.types import CHUNK, RunOptions

ExactnessLabel = Literal["exact", "rounding", "approximate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """Distance of a clip from the reference: our plain PyTorch in the run's precision.

    Attributes:
        label: "exact" for the reference itself; "rounding" where the same mathematics is computed
            in another order; "approximate" where other mathematics is.
        approximate: what is approximated, with its parameters.
        rounding: what is computed in another order.
    """

    label: ExactnessLabel
    approximate: tuple[str, ...] = ()
    rounding: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The label, and what it stands for, in one line."""
        reasons = self.approximate or self.rounding
        return f"{self.label}: {'; '.join(reasons)}" if reasons else self.label


def exactness(engines: Mapping[str, str], *options: RunOptions) -> Exactness:
    """Return the label of a clip.

    Args:
        engines: backend of each network, "eager" without engines.
        options: of the run, and of the one that decoded its latents, if that was another.
    """
    found = [text for one in options for text in approximations(one)]
    rounding = [
        *(
            f"{name} on {backend} engines"
            for name, backend in engines.items()
            if backend != "eager"
        ),
        *(text for one in options for text in _roundings(one)),
    ]
    return Exactness(
        label="approximate" if found else "rounding" if rounding else "exact",
        approximate=tuple(dict.fromkeys(found)),
        rounding=tuple(dict.fromkeys(rounding)),
    )


def approximations(options: RunOptions) -> tuple[str, ...]:
    """List what the options approximate. Every option that approximates has its line here."""
    found = []
    if options.linear != "exact":
        found.append(f"linear layers of the transformers (--linear {options.linear})")
    if options.step_cache is not None:
        found.append(f"some steps of the draft extrapolated (--step-cache {options.step_cache:g})")
    if options.sparse_attention is not None:
        keep = f"{options.sparse_attention:g}"
        found.append(f"self-attention of the high-res stage (--sparse-attention {keep})")
    if options.guidance_reuse:
        steps = f"{options.guidance_reuse} of the high-res steps"
        found.append(f"no negative pass in {steps} (--guidance-reuse {options.guidance_reuse})")
    if options.image_highres:
        found.append(
            "a first frame that the high-res network was not trained for (--image-highres)"
        )
    if options.vae_precision != "fp32":
        found.append(f"decoder (--vae-precision {options.vae_precision})")
    return tuple(found)


def _roundings(options: RunOptions) -> tuple[str, ...]:
    """List what the options compute in another order than the reference."""
    found = []
    if options.kernels != "reference":
        found.append(f"operations (--kernels {options.kernels})")
    if options.attention_kernel not in ("reference", options.kernels):
        found.append(f"attention (--attention {options.attention_kernel})")
    if options.conv == "winograd":
        found.append("convolutions of the decoder (--conv winograd)")
    if options.chunk != CHUNK:
        found.append(f"parts of the tokens (--chunk {options.chunk})")
    return tuple(found)
