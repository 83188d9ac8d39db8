# SPDX-License-Identifier: Apache-2.0
"""The networks of a run's stages: each is loaded when a clip first needs it, as the plan has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Concatenate, ParamSpec, TypeVar

import torch

from pw_kernels.op import using
from pw_runtime.checkpoint.loader import load_decoder, load_encoder, load_text_network
from pw_runtime.execution.divided_transformer import load_divided
from pw_runtime.execution.transformer import SegmentedDiT, load_transformer
from pw_runtime.job.follow import on_all_ranks
from pw_runtime.job.run import Run
from pw_runtime.models import VaeDecoder, VaeEncoder
from pw_runtime.models.text_encoder import TextNetwork
from pw_runtime.planning.oom_fallback import LazyNetwork
from pw_runtime.planning.warm_networks import loading_options
from pw_runtime.types import Latent, RunPlan, StageName

Net = TypeVar("Net")
Arguments = ParamSpec("Arguments")


def text_network(run: Run) -> LazyNetwork[TextNetwork]:
    """Return the tokenizer and the text encoder, on the planned device."""

    def load(plan: RunPlan) -> TextNetwork:
        device = run.request.device if plan.text == "device" else torch.device("cpu")
        return load_text_network(run.bundle, run.request.options.compute_precision, device)

    return _lazy(run, "text", load, "text encoder")


def encoder(run: Run) -> LazyNetwork[VaeEncoder]:
    """Return the VAE encoder, on the planned device."""

    def load(plan: RunPlan) -> VaeEncoder:
        device = run.request.device if plan.encode == "device" else torch.device("cpu")
        return load_encoder(run.bundle, device)

    return _lazy(run, "encode", load, "vae encoder")


def encoding(
    run: Run, encode: Callable[Concatenate[VaeEncoder, Arguments], Latent]
) -> Callable[Concatenate[VaeEncoder, Arguments], Latent]:
    """Return `encode` with the operations of the device that the current plan has the encoder on.

    Those of a run on a GPU do not take tensors of the CPU.
    """

    def compute(net: VaeEncoder, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Latent:
        apart = run.request.device.type != "cpu" and run.fallback.plan.encode == "host"
        with using("reference") if apart else nullcontext():
            return encode(net, *args, **kwargs)

    return compute


def transformer(run: Run, stage: StageName) -> LazyNetwork[SegmentedDiT]:
    """Return a stage's transformer, its weights as planned, on the selected engines."""

    def load(plan: RunPlan) -> SegmentedDiT:
        engines, options = run.engines[stage], run.request.options
        chosen = plan.transformers[stage]
        if run.ranks is None or chosen.split.ranks == 1:
            say = run.reporter.say
            return load_transformer(run.bundle, stage, engines, chosen, options, say)
        with on_all_ranks(
            run.ranks, "load", stage=stage, plan=asdict(chosen), engines=engines.digest
        ):
            net = load_divided(run.bundle, stage, engines, chosen, options, run.ranks)
        assert net is not None, "rank 0 is among the ranks of every split"
        return net

    return _lazy(run, stage, load, stage, lambda net: net.close(), lambda net: net.forget())


def decoder(run: Run) -> LazyNetwork[VaeDecoder]:
    """Return the VAE decoder."""

    def load(plan: RunPlan) -> VaeDecoder:
        device, precision = run.request.device, run.request.options.vae_precision
        if run.ranks is None or plan.decode.ranks == 1:
            return load_decoder(run.bundle, device, precision)
        with on_all_ranks(run.ranks, "load decoder"):
            return load_decoder(run.bundle, device, precision)

    def close(vae: VaeDecoder) -> None:
        if run.ranks is not None and not run.ranks.failed:
            run.ranks.command("release")

    return _lazy(run, "decode", load, "vae", close)


def _lazy(
    run: Run,
    stage: str,
    load: Callable[[RunPlan], Net],
    label: str,
    close: Callable[[Net], None] = lambda net: None,
    rest: Callable[[Net], None] = lambda net: None,
) -> LazyNetwork[Net]:
    return LazyNetwork(
        stage,
        load,
        run.fallback,
        run.loading,
        label=label,
        close=close,
        rest=rest,
        warm=run.warm,
        made_of=(
            run.bundle.weights_digest,
            loading_options(run.request.options),
            run.request.preset,
        ),
    )
