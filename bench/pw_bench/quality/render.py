# SPDX-License-Identifier: Apache-2.0
"""Clips of held-out scenes, made by the stages of the runtime, for measurement.

Videos are [3, F, height, width] in [-1, 1].
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

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

FIRST_HELD_OUT = 10**6  # no training draws numbers from here on
SMALLEST_STEP = 2.0  # dt of the high-res network's plain velocity


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out scene and a way to say it."""

    scene: Scene
    text: str
    position: int  # as that of a prompt: it fixes the seeds


def examples(count: int) -> list[Example]:
    """The first held-out scenes, of combinations that no training clip has."""
    found: list[Example] = []
    number = FIRST_HELD_OUT
    while len(found) < count:
        scene = draw_scene(number)
        if scene.held_out:
            text = caption(scene, random.Random(number))
            found.append(Example(scene, text, len(found) + 1))
        number += 1
    return found


class NotToldTheStep(SegmentedDiT):
    """A high-res network that is always given the smallest step size."""

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """As ever, without dt."""
        return super().modulation(t, None if dt is None else torch.full_like(dt, SMALLEST_STEP))

    def control_inputs(self, features: Tensor, t: Tensor, dt: Tensor) -> ControlInputs:
        """As ever, without dt."""
        return super().control_inputs(features, t, torch.full_like(dt, SMALLEST_STEP))


@dataclass(frozen=True, slots=True)
class Studio:
    """All networks of a bundle on the CPU, in fp32."""

    text: TextNetwork
    draft: SegmentedDiT
    highres: SegmentedDiT
    no_step: SegmentedDiT
    no_adapter: SegmentedDiT
    encoder: VaeEncoder
    decoder: VaeDecoder
    text_len: int

    def context(self, text: str) -> TextContext:
        """Contexts of a prompt and of the default negative."""
        cond, uncond = (
            encode_text(self.text, one, self.text_len, print) for one in (text, OFFICIAL_NEGATIVE)
        )
        return TextContext(cond=cond, uncond=uncond)

    def draft_of(self, example: Example, preset: Preset) -> Latent:
        """The draft latent, from the noise that a run would draw."""
        shape = latent_shape(preset.draft, preset.video)
        noise = draw_noise(shape, seeds_for(0, example.position).draft, torch.device("cpu"))
        context = self.context(example.text)
        return denoise_draft(self.draft, context, noise, preset.draft, preset.compat, _quiet)

    def paint(
        self, example: Example, low: Latent, preset: Preset, net: SegmentedDiT, steps: int
    ) -> Latent:
        """The high-res latent of a draft, in some number of steps."""
        assert preset.highres is not None
        plan = replace(preset.highres, steps=steps)
        noise = draw_noise(
            latent_shape(plan, preset.video),
            seeds_for(0, example.position).highres,
            torch.device("cpu"),
        )
        conditioning = resize_draft(low, plan)
        context, compat = self.context(example.text), preset.compat
        return denoise_highres(net, context, conditioning, noise, plan, compat, _quiet)

    def latent_of(self, video: Tensor) -> Latent:
        """What the encoder makes of a video."""
        return Latent(x=self.encoder(video))

    def frames(self, latent: Latent) -> Tensor:
        """The video of a latent, of 8 bits as the runtime writes them."""
        chunks = decode_frames(self.decoder, latent, TilingConfig(), Compat())
        frames = torch.cat([chunk.frames for chunk in chunks]).float()
        return frames.permute(3, 0, 1, 2) / 127.5 - 1


def _quiet(part: float) -> None:
    pass


def open_studio(bundle: Bundle) -> Studio:
    """Load everything. Raises BadWeights."""
    cpu = torch.device("cpu")
    return Studio(
        text=load_text_network(bundle, "fp32", cpu),
        draft=_network(bundle, "draft"),
        highres=_network(bundle, "highres"),
        no_step=_network(bundle, "highres", NotToldTheStep),
        no_adapter=_network(bundle, "highres", silent=True),
        encoder=_encoder(bundle),
        decoder=load_decoder(bundle, cpu),
        text_len=bundle.networks.draft.config.text_len,
    )


def _encoder(bundle: Bundle) -> VaeEncoder:
    encoder = VaeEncoder(bundle.networks.vae.config)
    encoder.load_state_dict(load_tensors(bundle, "vae", prefix=("encoder.", "conv1.")))
    return encoder.requires_grad_(False)


def _network(
    bundle: Bundle,
    stage: StageName,
    kind: type[SegmentedDiT] = SegmentedDiT,
    *,
    silent: bool = False,
) -> SegmentedDiT:
    """A transformer; a silent one's adapter adds nothing."""
    net = load_dit(bundle, stage, "fp32", torch.device("cpu"))
    if silent:
        for weight in net.spatial_adapter.zero_layers.parameters():
            weight.zero_()
    segments = segments_of(net.config, "fp32", CHUNK)
    return kind(net, segments, eager_engines(segments))
