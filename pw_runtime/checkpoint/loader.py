# SPDX-License-Identifier: Apache-2.0
"""Load networks from a bundle. Weights stay mapped from disk until they are used."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pw_kernels.attention import HEAD_WIDTHS
from pw_runtime.checkpoint.bundle import (
    TOKENIZER,
    Bundle,
    check_tensors,
    load_tensors,
    read_verified,
    require_unchanged,
)
from pw_runtime.checkpoint.lora import merged
from pw_runtime.checkpoint.tokenizer import SETTINGS_FILE, TOKENIZER_FILE, parse_tokenizer
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.models import TextEncoder, VaeDecoder, VaeEncoder, WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.models.quantized_linear import (
    is_quantized,
    quantized_weights,
)
from pw_runtime.models.text_encoder import TextNetwork
from pw_runtime.models.tokenizer import TextTokenizer
from pw_runtime.types import (
    AttentionKernel,
    DitConfig,
    LinearFormat,
    Network,
    Precision,
    Residency,
    StageName,
)

ALWAYS_NEEDED: tuple[Network, ...] = ("text_encoder", "vae")


def require_dit(bundle: Bundle, network: StageName) -> DitConfig:
    """Return the config of a transformer. Raises BadWeights if the bundle lacks it."""
    entry = bundle.networks.draft if network == "draft" else bundle.networks.highres
    if entry is None:
        raise BadWeights(
            f"{bundle.root} has no high-res network",
            wanted="a bundle converted with PixelWizard's high-res checkpoint",
            do="run `pw convert` with --highres model.pt, or generate with --draft-only",
        )
    return entry.config


def check_networks(bundle: Bundle, stages: Iterable[StageName], attention: AttentionKernel) -> None:
    """Check names and shapes of all tensors that the stages need, reading only file headers.

    Raises BadWeights, and BadRequest for a head width that the attention kernel does not support.
    """
    for stage in stages:
        width = require_dit(bundle, stage).head_dim
        if attention in ("triton", "gluon") and width not in HEAD_WIDTHS:
            raise BadRequest(
                f"--attention {attention} does not support the {stage} network",
                got=f"heads of width {width}",
                wanted=f"heads of width {' or '.join(map(str, HEAD_WIDTHS))}",
                do="add --attention reference",
            )
    for network in (*stages, *ALWAYS_NEEDED):
        check_tensors(bundle, network)


def load_dit(
    bundle: Bundle,
    network: StageName,
    precision: Precision,
    device: torch.device,
    weights: Residency = "resident",
    linear: LinearFormat = "exact",
) -> WanDiT:
    """Load a transformer.

    Resident weights are converted and moved to `device`, streamed ones converted and kept in host
    memory, mapped ones left in the bundle's files until a block needs them (see `TransformerPlan`).
    The bundle's LoRAs are merged into each weight before that; into mapped ones by those who read
    them. Weights of quantized layers are quantized from the merged values, one after the other.

    Raises BadWeights for a file that is missing, damaged or of other shapes, and for weights that
    cannot be quantized.
    """
    config = require_dit(bundle, network)
    assert weights != "mapped" or linear == "exact", "the planner offers no quantizing at every use"
    with torch.device("meta"):
        net = WanDiT(config)
    stored = load_tensors(bundle, network)
    for name, weight in list(stored.items()):
        if weights == "mapped" and is_streamed(name):
            continue
        weight = merged(bundle.loras.get(network, ()), name, weight)
        if linear != "exact" and is_quantized(name, config.num_layers, linear):
            place = device if weights == "resident" else weight.device
            parts = quantized_weights(name, weight.to(device), linear)
            stored |= {part: tensor.to(place) for part, tensor in parts}
        elif not is_streamed(name):
            stored[name] = aligned(store_dit_weight(name, weight.to(device), precision))
        elif weights == "resident":
            stored[name] = store_dit_weight(name, weight.to(device), precision)
        else:
            stored[name] = store_dit_weight(name, weight, precision)
    if linear != "exact":
        net.prepare_quantized(linear)
    require_unchanged(bundle, network)  # meanwhile most of the weights were copied
    net.load_state_dict(stored, assign=True)
    return net.eval().requires_grad_(False)


def aligned(weight: Tensor) -> Tensor:
    """Return a weight in memory that begins at a multiple of 64 bytes, as PyTorch's own does.

    In a file it may begin at any multiple of 8, and what MKL makes of one row, such as that of a
    timestep, depends on that: the same weights in two files would give two clips. For the weights
    outside the blocks, which are few; those of blocks multiply many rows.
    """
    return weight if weight.data_ptr() % 64 == 0 else weight.clone()


def load_decoder(bundle: Bundle, device: torch.device, precision: Precision = "fp32") -> VaeDecoder:
    """Load the decoder of the VAE. Raises BadWeights as `load_dit` does.

    With "bf16", weights and activations are bf16; norms and their gains, the softmax of attention
    and the scale of the latent stay fp32.
    """
    with torch.device("meta"):
        decoder = VaeDecoder(bundle.networks.vae.config)
    weights = load_tensors(bundle, "vae", prefix=("decoder.", "conv2."))
    decoder.load_state_dict(
        {
            name: channels_last(decoder_weight(name, w.to(device), precision))
            for name, w in weights.items()
        },
        assign=True,
    )
    require_unchanged(bundle, "vae")
    return decoder.eval().requires_grad_(False)


def load_encoder(bundle: Bundle, device: torch.device) -> VaeEncoder:
    """Load the encoder of the VAE in fp32. Raises BadWeights as `load_dit` does."""
    with torch.device("meta"):
        encoder = VaeEncoder(bundle.networks.vae.config)
    weights = load_tensors(bundle, "vae", prefix=("encoder.", "conv1."))
    encoder.load_state_dict(
        {name: w.to(device, torch.float32) for name, w in weights.items()}, assign=True
    )
    require_unchanged(bundle, "vae")
    return encoder.eval().requires_grad_(False)


def decoder_weight(name: str, weight: Tensor, precision: Precision) -> Tensor:
    """Convert a weight of the decoder to the precision, except gains of norms, which stay fp32."""
    fp32 = precision == "fp32" or name.endswith("gamma")
    return weight.to(torch.float32 if fp32 else torch.bfloat16)


def channels_last(weight: Tensor) -> Tensor:
    """Convert convolution weights to the memory layout of the decoder's activations."""
    if weight.dim() not in (4, 5):
        return weight
    layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return weight.contiguous(memory_format=layout)


def load_text_network(bundle: Bundle, precision: Precision, device: torch.device) -> TextNetwork:
    """Load tokenizer and text encoder; with "bf16" all weights are bf16, as officially.

    Raises BadWeights as `load_dit` does, and for a tokenizer that cannot be read.
    """
    config = bundle.networks.text_encoder.config
    tokenizer = load_tokenizer(bundle, config.vocab_size)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        encoder = TextEncoder(config)
    weights = load_tensors(bundle, "text_encoder")
    weights = {name: w.to(device, dtype) for name, w in weights.items()}
    require_unchanged(bundle, "text_encoder")
    encoder.load_state_dict(weights, assign=True)
    return TextNetwork(tokenizer, encoder.eval().requires_grad_(False))


def load_tokenizer(bundle: Bundle, most: int) -> TextTokenizer:
    """Load the tokenizer, of at most `most` tokens. Raises BadWeights."""
    files = {
        name: read_verified(bundle, path)
        for name in (TOKENIZER_FILE, SETTINGS_FILE)
        if (path := f"{TOKENIZER}/{name}") in bundle.files
    }
    remedy = "convert the checkpoint again, with its complete tokenizer folder"
    tokenizer = parse_tokenizer(bundle.tokenizer, files, do=remedy)
    if tokenizer.size > most:
        raise BadWeights(
            f"{bundle.tokenizer} is not the tokenizer of this text encoder",
            got=f"{tokenizer.size} tokens",
            wanted=f"at most {most}, the rows of the token table",
            do=remedy,
        )
    return tokenizer


def is_streamed(name: str) -> bool:
    """Return whether a weight of this name can be streamed: all of a block but its modulation."""
    return name.startswith("blocks.") and not name.endswith(".modulation")
