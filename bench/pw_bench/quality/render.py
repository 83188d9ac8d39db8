# SPDX-License-Identifier: Apache-2.0
"""Clips of held-out scenes, made by the stages of the runtime.

Videos are [3, F, height, width] in [-1, 1].
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from pw_export.nano.captions import caption
from pw_export.nano.scenes import Scene, draw_scene
from pw_runtime.checkpoint.bundle import Bundle, load_tensors
from pw_runtime.checkpoint.loader import load_decoder, load_dit, load_text_network
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.protocols import ControlInputs
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.models import VaeDecoder
from pw_runtime.models.dit import Modulation
from pw_runtime.models.text_encoder import TextNetwork
from pw_runtime.models.vae import VaeEncoder
from pw_runtime.sampling.noise import draw_noise, latent_shape, seeds_for
from pw_runtime.stages.condition import resize_draft
from pw_runtime.stages.decode import decode_frames
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.stages.highres import denoise_highres
from pw_runtime.stages.text import encode_text
from pw_runtime.types import (
    CHUNK,
    OFFICIAL_NEGATIVE,
    Compat,
    Latent,
    Preset,
    StageName,
    TextContext,
    TilingConfig,
)

FIRST_HELD_OUT = 10**6  # training draws smaller numbers only
SMALLEST_STEP = 2.0  # dt of the high-res network's plain velocity


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out scene and a caption of it."""

    scene: Scene
    text: str
    position: int  # as of a prompt: it determines the seeds


HARD: Final[dict[str, Callable[[Scene], bool]]] = {  # of the varied scenes
    "tiny": lambda scene: scene.size == "tiny" and scene.other is None,
    "pairs": lambda scene: scene.other is not None,
}


def examples(count: int, group: str | None = None) -> list[Example]:
    """Return the first held-out scenes, of combinations that no training clip has.

    A group of HARD has more than the one shape, small or big, of the others.
    """
    held_out: list[Example] = []
    number = FIRST_HELD_OUT
    while len(held_out) < count:
        scene = draw_scene(number, varied=group is not None)
        if scene.held_out and (group is None or HARD[group](scene)):
            text = caption(scene, random.Random(number))
            held_out.append(Example(scene, text, len(held_out) + 1))
        number += 1
    return held_out


class FixedStepSize(SegmentedDiT):
    """A high-res network that always receives the smallest step size."""

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """Do the same as the base class, ignoring dt."""
        return super().modulation(t, None if dt is None else torch.full_like(dt, SMALLEST_STEP))

    def control_inputs(self, features: Tensor, t: Tensor, dt: Tensor) -> ControlInputs:
        """Do the same as the base class, ignoring dt."""
        return super().control_inputs(features, t, torch.full_like(dt, SMALLEST_STEP))


@dataclass(frozen=True, slots=True)
class Renderer:
    """All networks of a bundle on the CPU, in fp32; `no_dt` and `no_adapter` lack that part."""

    text: TextNetwork
    draft: SegmentedDiT
    highres: SegmentedDiT
    no_dt: SegmentedDiT
    no_adapter: SegmentedDiT
    encoder: VaeEncoder
    decoder: VaeDecoder
    text_len: int

    def context(self, text: str) -> TextContext:
        """Encode a prompt and the default negative."""
        cond, uncond = (
            encode_text(self.text, line, self.text_len, print) for line in (text, OFFICIAL_NEGATIVE)
        )
        return TextContext(cond=cond, uncond=uncond)

    def draft_latent(self, example: Example, preset: Preset) -> Latent:
        """Denoise the draft, from the noise that a run would draw."""
        shape = latent_shape(preset.draft, preset.video)
        noise = draw_noise(shape, seeds_for(0, example.position).draft, torch.device("cpu"))
        context = self.context(example.text)
        return denoise_draft(self.draft, context, noise, preset.draft, preset.compat, _ignore)

    def highres_latent(
        self, example: Example, low: Latent, preset: Preset, net: SegmentedDiT, steps: int
    ) -> Latent:
        """Denoise the high-res latent of a draft, in some number of steps."""
        assert preset.highres is not None
        config = replace(preset.highres, steps=steps)
        noise = draw_noise(
            latent_shape(config, preset.video),
            seeds_for(0, example.position).highres,
            torch.device("cpu"),
        )
        context, conditioning = self.context(example.text), resize_draft(low, config)
        inputs = (context, conditioning, noise, config, preset.compat)
        return denoise_highres(net, *inputs, _ignore)

    def encode(self, video: Tensor) -> Latent:
        """Encode a video."""
        return Latent(x=self.encoder(video))

    def decode(self, latent: Latent) -> Tensor:
        """Decode a latent to video, rounded to 8 bits as the runtime writes it."""
        chunks = decode_frames(self.decoder, latent, TilingConfig(), Compat())
        frames = torch.cat([chunk.frames for chunk in chunks]).float()
        return frames.permute(3, 0, 1, 2) / 127.5 - 1


def _ignore(share: float) -> None:
    pass


def load_renderer(bundle: Bundle) -> Renderer:
    """Load all networks. Raises BadWeights."""
    cpu = torch.device("cpu")
    return Renderer(
        text=load_text_network(bundle, "fp32", cpu),
        draft=load_network(bundle, "draft"),
        highres=load_network(bundle, "highres"),
        no_dt=load_network(bundle, "highres", FixedStepSize),
        no_adapter=load_network(bundle, "highres", mute_adapter=True),
        encoder=_encoder(bundle),
        decoder=load_decoder(bundle, cpu),
        text_len=bundle.networks.draft.config.text_len,
    )


def _encoder(bundle: Bundle) -> VaeEncoder:
    encoder = VaeEncoder(bundle.networks.vae.config)
    encoder.load_state_dict(load_tensors(bundle, "vae", prefix=("encoder.", "conv1.")))
    return encoder.requires_grad_(False)


def load_network(
    bundle: Bundle,
    stage: StageName,
    network: type[SegmentedDiT] = SegmentedDiT,
    *,
    mute_adapter: bool = False,
) -> SegmentedDiT:
    """Load a transformer; a muted adapter adds nothing."""
    net = load_dit(bundle, stage, "fp32", torch.device("cpu"))
    if mute_adapter:
        for weight in net.spatial_adapter.zero_layers.parameters():
            weight.zero_()
    segments = segments_of(net.config, "fp32", CHUNK)
    return network(net, segments, eager_engines(segments))
