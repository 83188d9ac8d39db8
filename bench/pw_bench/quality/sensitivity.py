# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of a transformer to quantized linear layers: one block, or one kind, at a time.

All layers of one block, or the layers of one name in all blocks, are quantized; the others stay
exact. The error is that of the last latent of the stage, for whole denoising loops. The high-res
network gets the draft of the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from pw_bench.quality.gate import highres_of
from pw_bench.quality.render import Example, Renderer, load_renderer
from pw_bench.result_sections import OutputDifference
from pw_engines.engine import relative_l2
from pw_kernels.quantized_linear import NumberFormat
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.models import WanDiT
from pw_runtime.models.embeddings import Positions, sinusoid
from pw_runtime.models.quantized_linear import QUANTIZED, QuantizedLinear, quantized_weights
from pw_runtime.types import Latent, Preset, StageName

STAGES: Final[tuple[StageName, ...]] = ("draft", "highres")


class Undivided:
    """A WanDiT as a whole behind the interface that the stages use of a transformer."""

    def __init__(self, net: WanDiT) -> None:
        """Take the network; a draft network has no control."""
        self.net = net
        self.text_keys_values, self.modulation = net.text_keys_values, net.modulation
        self.control_features = net.draft_features

    def check_weights(self) -> None:
        """Do nothing: what a velocity that is not finite is due to does not matter here."""

    def layout(self, latent: Tensor, clean: int = 0) -> Positions:
        """Compute the positions of a latent. Raises ValueError for clean frames."""
        if clean:
            raise ValueError("an undivided network takes all tokens with one timestep")
        return self.net.positions(latent)

    def control_inputs(self, features: Tensor, t: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """Compute the control of one step."""
        steps = (sinusoid(x, self.net.config.freq_dim) for x in (t, dt))
        return self.net.control(features, *steps)

    def velocities(
        self,
        latent: Tensor,
        texts: Sequence[Any],
        modulation: Any,
        layout: Any,
        control: Any = None,
        on_block: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """Compute one velocity per text, [C, T, H, W]."""
        return [self.net(latent, text, modulation, layout, control) for text in texts]


def quantize_layers(block: nn.Module, names: Sequence[str], linear: NumberFormat) -> None:
    """Quantize some linear layers of a block, in place. Raises BadWeights."""
    for name in names:
        parent, _, child = name.rpartition(".")
        module, layer = block.get_submodule(parent), block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantized, bias = QuantizedLinear(layer, linear), layer.bias
        stored = dict(quantized_weights("weight", layer.weight, linear))
        stored = {key.removeprefix("weight."): x for key, x in stored.items()}
        quantized.load_state_dict({**stored, "bias": bias}, assign=True)
        module.register_module(child, quantized)


def sensitivity(
    bundle: Bundle,
    preset: Preset,
    held_out: list[Example],
    formats: Sequence[NumberFormat],
    say: Callable[[str], None],
) -> Iterator[OutputDifference]:
    """Yield the error of the last latents for every format, part and stage."""
    renderer = load_renderer(bundle)
    drafts = [renderer.draft_latent(example, preset).x for example in held_out]
    for stage in STAGES:
        net = load_dit(bundle, stage, "fp32", torch.device("cpu"))
        exact = _latents(stage, net, renderer, preset, held_out, drafts)
        blocks = range(len(net.blocks))
        parts: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            f"block {block}": ((block,), QUANTIZED) for block in blocks
        }
        parts |= {f"{name} of all blocks": (tuple(blocks), (name,)) for name in QUANTIZED}
        for linear in formats:
            say(f"{stage}, {linear}: {len(parts)} parts")
            for part, (chosen, names) in parts.items():
                changed = deepcopy(net)
                for block in chosen:
                    quantize_layers(changed.blocks[block], names, linear)
                got = _latents(stage, changed, renderer, preset, held_out, drafts)
                yield OutputDifference(
                    side=f"{linear}, {stage}, {part}",
                    against="exact",
                    max_abs=(got - exact).abs().max().item(),
                    unit="last latent",
                    relative_l2=relative_l2(got, exact),
                )


def _latents(
    stage: StageName,
    net: WanDiT,
    renderer: Renderer,
    preset: Preset,
    held_out: list[Example],
    drafts: list[Tensor],
) -> Tensor:
    """Return the stage's latents of all captions, [captions, C, T, H, W]."""
    transformer: Any = Undivided(net)
    if stage == "draft":
        drawing = replace(renderer, draft=transformer)
        return torch.stack([drawing.draft_latent(example, preset).x for example in held_out])
    steps = highres_of(preset).steps
    return torch.stack(
        [
            renderer.highres_latent(example, Latent(x=low), preset, transformer, steps).x
            for example, low in zip(held_out, drafts, strict=True)
        ]
    )
