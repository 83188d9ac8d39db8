# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA of the built-in model: every scene as a poster, with a black ground below paper.

python -m pw_export.nano.train_lora --work DIR

The networks stay as they are; products of two small matrices beside some of their weights learn the
velocities of posters. The draft network learns first, then the high-res network, from drafts that
are posters. A stopped training continues where it was. The files have the names that ComfyUI gives
LoRAs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.checkpoint import Tensors
from pw_export.nano.data import (
    CPU,
    DRAFT_SIZES,
    FRAMES,
    HD_SIZE,
    HIGHRES_SIZES,
    noise_levels,
    training_scenes,
)
from pw_export.nano.scenes import WIDE, Landscape, Scene, render
from pw_export.nano.train_draft import DIT, SHIFT, TEXT_ENCODER, TextToLatent, named
from pw_export.nano.train_highres import (
    HD,
    HIGHRES,
    USUAL,
    Teacher,
    on_token_grid,
    shortcut_loss,
)
from pw_export.nano.train_vae import VAE
from pw_export.nano.trainable import velocities
from pw_export.nano.training import Recipe, train
from pw_export.nano.weights import TRAINED, read_weights
from pw_runtime.models import VaeEncoder, WanDiT
from pw_runtime.system.atomic_files import write_tensors

RANK: Final = 4
LAYERS: Final = re.compile(r"blocks\.\d+\.(self_attn\.[vo]|ffn\.[02])|head\.head")
PAPER, INK = (0.98, 0.95, 0.86), (0.06, 0.05, 0.08)
POSTER: Final = Landscape(PAPER, PAPER, INK)  # whatever landscape the text asks for
SMALL = HIGHRES_SIZES[WIDE]
LARGE_EVERY = 4  # steps; one of them uses the size of nano-hd
SCENES, LARGE_SCENES = 40, 6  # of the large size there are fewer: they take longest to encode
BATCH, HIGHRES_BATCH, LARGE_BATCH = 10, 3, 1
DRAFT_RECIPE = Recipe(steps=150, other_lr=8e-3, warmup=10, ema=0.95, seed=11)
HIGHRES_RECIPE = Recipe(steps=100, other_lr=6e-3, warmup=10, ema=0.95, seed=12)


class LowRank(nn.Module):
    """A parametrization of a weight: itself plus the product of two small matrices."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        """Begin with a product of zero."""
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns, generator=generator) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """[N, K] -> [N, K]."""
        return weight + self.up @ self.down


def add_lora(net: nn.Module, seed: int) -> nn.ModuleDict:
    """Freeze a network and give the weights of LAYERS a trainable product, by flat names."""
    generator, added = torch.Generator().manual_seed(seed), nn.ModuleDict()
    net.requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if LAYERS.fullmatch(name):
            assert isinstance(layer, nn.Linear)
            added[_flat(name)] = product = LowRank(layer.weight, generator)
            parametrize.register_parametrization(layer, "weight", product)
    return added


def lora_tensors(net: nn.Module, average: dict[str, Tensor]) -> Tensors:
    """Return the trained matrices in fp16 with ComfyUI's names."""
    tensors = {}
    for name in (name for name, _ in net.named_modules() if LAYERS.fullmatch(name)):
        for part, letter in (("down", "A"), ("up", "B")):
            x = average[f"{_flat(name)}.{part}"].half().contiguous()
            tensors[f"diffusion_model.{name}.lora_{letter}.weight"] = x
    return tensors


def _flat(name: str) -> str:
    return name.replace(".", "_")


class Posters:
    """Latents of training scenes as posters, at one size, by the built-in VAE."""

    def __init__(self, encoder: VaeEncoder, size: tuple[int, int], count: int) -> None:
        """Draw and encode the first scenes."""
        self.scenes = training_scenes(count)
        with torch.inference_mode():
            encoded = [encoder(render(x, *size, FRAMES, landscape=POSTER)) for x in self.scenes]
        self.latents = torch.stack(encoded).clone()  # [N, C, T, H, W]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
        """Draw latents [B, C, T, H, W] and their scenes."""
        indices = torch.randint(len(self.scenes), (count,), generator=generator)
        return self.latents[indices].clone(), [self.scenes[int(i)] for i in indices]


def train_draft(work: Path, teacher: Teacher, clips: Posters, recipe: Recipe) -> Tensors:
    """Train the LoRA of the draft network, and leave it in the teacher's; return its tensors."""
    net = teacher.model.dit
    added = add_lora(net, recipe.seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clean, scenes = clips.draw(BATCH, generator)
        texts = teacher.texts(scenes, generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(BATCH, SHIFT, generator)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        return F.mse_loss(velocities(net, noisy, 1000 * sigma, texts), noise - clean)

    return _trained(work, "lora-draft", net, added, loss, recipe)


def train_highres(
    work: Path, teacher: Teacher, net: WanDiT, clips: list[Posters], recipe: Recipe
) -> Tensors:
    """Train the LoRA of the high-res network on drafts of the teacher; return its tensors.

    Args:
        work: folder for states and logs.
        teacher: whose draft network has its LoRA.
        net: the high-res network.
        clips: in the sizes of the draft, SMALL and HD_SIZE, of the same scenes.
        recipe: steps and learning rate.
    """
    added = add_lora(net, recipe.seed)
    low, small, large = clips

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen, count, size, shift = small, HIGHRES_BATCH, SMALL, USUAL.shift
        if step % LARGE_EVERY == LARGE_EVERY - 1:
            chosen, count, size, shift = large, LARGE_BATCH, HD_SIZE, HD.shift
        indices = torch.randint(len(chosen.scenes), (count,), generator=generator)
        texts = teacher.texts([chosen.scenes[int(i)] for i in indices], generator)
        with torch.no_grad():
            drafts = teacher.drafts(low.latents[indices], texts, generator)
        drafts = on_token_grid(drafts, size)
        return shortcut_loss(net, chosen.latents[indices], texts, drafts, shift, generator)

    return _trained(work, "lora-highres", net, added, loss, recipe)


def _trained(
    work: Path,
    name: str,
    net: WanDiT,
    added: nn.ModuleDict,
    loss: Callable[[int, torch.Generator], Tensor],
    recipe: Recipe,
) -> Tensors:
    average = train(work, name, added, loss, recipe)
    added.load_state_dict(average)
    return lora_tensors(net, average)


def built_in(folder: Path) -> tuple[Teacher, WanDiT, VaeEncoder]:
    """Load the built-in model: text encoder and draft network, high-res network, VAE encoder."""
    weights = read_weights(folder)
    model, highres, encoder = TextToLatent(DIT, TEXT_ENCODER), WanDiT(HIGHRES), VaeEncoder(VAE)
    model.load_state_dict(named(model, weights))
    model.requires_grad_(False)
    highres.load_state_dict(weights.highres)
    own = ("encoder.", "conv1.")
    encoder.load_state_dict({n: x for n, x in weights.vae.items() if n.startswith(own)})
    return Teacher(model, make_tokenizer(), CPU), highres, encoder


def main() -> None:
    """Run `python -m pw_export.nano.train_lora`."""
    parser = argparse.ArgumentParser(description="Train a LoRA of the built-in model.")
    parser.add_argument("--work", type=Path, required=True, help="folder for states and results")
    parser.add_argument("--weights", type=Path, default=TRAINED, help="of the built-in model")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    teacher, highres, encoder = built_in(given.weights)
    counts = {DRAFT_SIZES[WIDE]: SCENES, SMALL: SCENES, HD_SIZE: LARGE_SCENES}
    clips = [Posters(encoder, size, count) for size, count in counts.items()]
    draft = train_draft(given.work, teacher, clips[0], DRAFT_RECIPE)
    write_tensors(given.work / "lora_draft.safetensors", draft)
    tensors = train_highres(given.work, teacher, highres, clips, HIGHRES_RECIPE)
    write_tensors(given.work / "lora_highres.safetensors", tensors)


if __name__ == "__main__":
    main()
