# SPDX-License-Identifier: Apache-2.0
"""Errors of quantized linear layers: of a layer, of a block, of latents and clips.

`sensitivity` is a part of it: the last latents where one block or one kind of layer is quantized.

    pw bench linear-error --model BUNDLE --out bench/results/NAME.json

Layers and a block of the built-in model get what they get in a run; those of the published widths
get random weights and synthetic tokens, a few of whose channels are large, as a transformer's are.
All on the CPU: results of compiled engines differ from these by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_bench.e2e.job import ClipFacts
from pw_bench.e2e.runtime_program import facts_of, operations_in
from pw_bench.measure.environment import envelope, identify
from pw_bench.quality.approximations import EXACT, REFERENCE, clip_difference
from pw_bench.quality.gate import highres_of
from pw_bench.quality.render import Example, examples
from pw_bench.quality.sensitivity import sensitivity
from pw_bench.result_sections import Equivalence, OutputDifference
from pw_bench.results import Result
from pw_engines.engine import relative_l2
from pw_export.wan22_configs import DRAFT
from pw_kernels.quantized_linear import GRIDS, NumberFormat
from pw_runtime import Prompt, Reporter, Request, find_preset, generate
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.checkpoint.loader import load_dit, load_text_network
from pw_runtime.job.receipt import read_receipt
from pw_runtime.models.blocks import Block, TextKeysValues
from pw_runtime.models.embeddings import Positions, rope_tables
from pw_runtime.models.quantized_linear import (
    QUANTIZED,
    QuantizedLinear,
    prepare_block,
    quantized_weights,
)
from pw_runtime.sampling.noise import draw_noise, latent_shape, seeds_for
from pw_runtime.sampling.schedule import make_schedule, time_input
from pw_runtime.stages.text import encode_text
from pw_runtime.types import LinearFormat, Preset

CPU: Final = torch.device("cpu")
LARGE: Final = 20.0  # times as large as the others are LARGE_SHARE of the channels of tokens
LARGE_SHARE: Final = 0.01
TEXT_ROWS: Final = 64


class Listening(QuantizedLinear):
    """An exact linear layer that keeps its last input, where a quantized one would be."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)
        self.heard = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """[S, K] -> [S, N]."""
        self.heard = x.detach().clone()
        return F.linear(x, self.weight, self.bias)


def measure_linear_error(
    model: Path, preset_name: str, *, clips: int, tokens: int, say: Callable[[str], None]
) -> Result:
    """Measure every format.

    Args:
        model: bundle of the built-in model.
        preset_name: of its clips; with a high-res stage.
        clips: number of held-out captions to make clips of.
        tokens: of the blocks of published width.
        say: called with a line for every part.

    Raises BadRequest, BadWeights, BadResult.
    """
    bundle, preset = open_bundle(model), find_preset(preset_name)
    highres_of(preset)  # refused now, not after the first parts
    identity = identify(CPU)
    held_out = examples(clips)
    differences: list[OutputDifference] = []
    with torch.inference_mode():
        for words, block, call in (
            ("built-in model", *_trained_block(bundle, preset, held_out[0])),
            ("published widths", *_wide_block(tokens)),
        ):
            say(f"layers and a block, {words}")
            differences += _block_differences(words, block, call)
        differences += sensitivity(bundle, preset, held_out, tuple(GRIDS), say)
    with TemporaryDirectory() as folder:
        facts = _make_clips(bundle, preset, held_out, Path(folder), say)
        equivalence = tuple(_clip_differences(held_out, Path(folder)))
    scope = {
        "words": "quantized linear layers beside exact ones in fp32",
        "built-in model": f"block 1 of the draft network, in the first step of {preset_name}",
        "published widths": f"{tokens} tokens, random weights; {LARGE_SHARE:.0%} of the channels "
        f"of the tokens are {LARGE:.0f} times as large as the others",
        "clips": f"{clips} of held-out captions, {preset_name}, both networks quantized",
        "precision": "fp32",
        "device": "cpu",
    }
    identity = replace(
        identity,
        weights={model.name: f"sha256:{bundle.digest}"},
        engines=facts.engines,
        operations=facts.operations,
    )
    return replace(
        envelope("linear-error", scope, identity),
        differences=tuple(differences),
        equivalence=equivalence,
    )


def _trained_block(
    bundle: Bundle, preset: Preset, example: Example
) -> tuple[Block, Callable[[Block], Tensor]]:
    """Return a block of the draft network, and a call of it as in the first step of a clip."""
    net = load_dit(bundle, "draft", "fp32", CPU)
    text = encode_text(
        load_text_network(bundle, "fp32", CPU), example.text, net.config.text_len, print
    )
    stage = preset.draft
    schedule = make_schedule(stage.solver, stage.steps, stage.shift)
    shape = latent_shape(stage, preset.video)
    noise = draw_noise(shape, seeds_for(0, example.position).draft, CPU)
    block, inputs = net.blocks[1], []
    assert isinstance(block, Block)
    handle = block.register_forward_pre_hook(
        lambda module, given: inputs.append((given[0].clone(), *given[1:]))
    )
    net(
        noise,
        net.text_keys_values(text),
        net.modulation(time_input(schedule.timesteps[0], CPU)),
        net.positions(noise),
    )
    handle.remove()
    x, *rest = inputs[0]
    return block, lambda run: run(x.clone(), *rest)


def _wide_block(tokens: int) -> tuple[Block, Callable[[Block], Tensor]]:
    """Return a block of published width with random weights, and a call of it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = DRAFT
    with torch.device("meta"):
        block = Block(config)
    stored = {
        name: normal(*x.shape) * (x.shape[1] ** -0.5 if x.dim() == 2 else 0.1)
        for name, x in block.state_dict().items()
    }
    for name in stored:
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            stored[name] = 1 + stored[name]
    block.load_state_dict(stored, assign=True)
    block.requires_grad_(False)
    x = normal(tokens, config.dim)
    large = torch.rand(config.dim, generator=generator) < LARGE_SHARE
    x[:, large] *= LARGE
    heads = (config.num_heads, config.head_dim)
    text = TextKeysValues(
        normal(TEXT_ROWS, *heads), normal(TEXT_ROWS, *heads), torch.zeros(TEXT_ROWS)
    )
    tables = rope_tables(tokens, config.head_dim, CPU)
    positions = Positions((tokens, 1, 1), *tables, torch.tensor([0, 1, 1]))
    rows = 0.1 * normal(1, 6, config.dim)
    rows[:, (2, 5)] += 1  # gates
    return block, lambda run: run(x.clone(), rows, positions, text)


def _block_differences(
    words: str, block: Block, call: Callable[[Block], Tensor]
) -> Iterator[OutputDifference]:
    """Compare every layer on its own input, and the whole block."""
    listening = deepcopy(block)
    layers: dict[str, Listening] = {}
    for name in QUANTIZED:
        parent, _, child = name.rpartition(".")
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layers[name] = Listening(layer)
        listening.get_submodule(parent).register_module(child, layers[name])
    exact = call(listening)
    for linear in GRIDS:
        quantized = quantize(block, linear)
        for name, layer in layers.items():
            expected = F.linear(layer.heard, layer.weight, layer.bias)
            got = quantized.get_submodule(name)(layer.heard)
            yield _difference(f"{linear}, {words}, {name}", got, expected)
        yield _difference(f"{linear}, {words}, block", call(quantized), exact)


def quantize(block: Block, linear: NumberFormat) -> Block:
    """Return the block with quantized linear layers."""
    result, stored = deepcopy(block), block.state_dict()
    for name in QUANTIZED:
        stored |= dict(quantized_weights(f"{name}.weight", stored[f"{name}.weight"], linear))
    prepare_block(result, linear)
    result.load_state_dict(stored, assign=True)
    return result


def _difference(side: str, got: Tensor, expected: Tensor) -> OutputDifference:
    return OutputDifference(
        side=side,
        against="exact",
        max_abs=(got - expected).abs().max().item(),
        unit="of the result",
        relative_l2=relative_l2(got, expected),
    )


def _make_clips(
    bundle: Bundle,
    preset: Preset,
    held_out: list[Example],
    folder: Path,
    say: Callable[[str], None],
) -> ClipFacts:
    """Make clips with every format, in a folder of its name; return the facts of an exact one."""
    prompts = tuple(
        Prompt(example.text, str(example.position), example.position) for example in held_out
    )
    for linear in get_args(LinearFormat):
        say(f"clips, {linear}")
        options, out = replace(REFERENCE, linear=linear), folder / linear
        request = Request(prompts=prompts, preset=preset, out=out, options=options)
        generate(request, bundle, Reporter(quiet=True))
    receipt = read_receipt(folder / EXACT / f"{prompts[0].id}.json")
    return facts_of(receipt, operations_in(receipt, REFERENCE))


def _clip_differences(held_out: list[Example], folder: Path) -> Iterator[Equivalence]:
    """Compare latents and frames of the clips of every format with the exact ones."""
    for linear in get_args(LinearFormat):
        for example in held_out if linear != EXACT else ():
            yield clip_difference(f"{linear}, caption {example.position}", folder, linear, example)
