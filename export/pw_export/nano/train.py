# SPDX-License-Identifier: Apache-2.0
"""Train the built-in model, or continue a training, and export its weights.

python -m pw_export.nano.train --work DIR [--begin WEIGHTS] [NETWORK ...]

Each network trains for the steps of its recipe; a stopped training continues where it was. Without
names all networks are trained, and the weights are written to DIR/weights. The VAE does not depend
on the transformers: on two cores, two such programs with one thread each are faster than one with
two threads. With `--begin`, networks begin with the weights in a folder; what DIR has not trained
to the end is taken from it, as the draft network and the decoder that others learn from, and
written. The blocks of the transformers are compiled, for which a C++ compiler is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from pw_export.nano.checkpoint import NanoTensors, Tensors
from pw_export.nano.train_draft import begun_model, train_draft
from pw_export.nano.train_highres import train_highres
from pw_export.nano.train_vae import DECODER_PARTS, part, train_decoder, train_encoder
from pw_export.nano.trainable import compile_blocks
from pw_export.nano.training import is_complete
from pw_export.nano.weights import keep_weights, read_losses, read_weights

Train = Callable[[Path, torch.device, NanoTensors | None], object]

TRAIN: dict[str, Train] = {
    "draft": lambda work, device, begin: train_draft(work, device=device, begin=begin),
    "highres": lambda work, device, begin: train_highres(
        work, _draft(work, device, begin), device=device, begin=begin
    ),
    "decoder": lambda work, device, begin: train_decoder(work, device=device, begin=begin),
    "encoder": lambda work, device, begin: train_encoder(
        work, _decoder(work, device, begin), device=device, begin=begin
    ),
}


def _draft(work: Path, device: torch.device, begin: NanoTensors | None) -> Tensors:
    if begin is None or is_complete(work, "draft"):
        return train_draft(work, device=device)
    return begun_model(begin).state_dict()


def _decoder(work: Path, device: torch.device, begin: NanoTensors | None) -> Tensors:
    if begin is None or is_complete(work, "decoder"):
        return train_decoder(work, device=device)
    return part(begin.vae, DECODER_PARTS)


def main() -> None:
    """Run `python -m pw_export.nano.train`."""
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, states and logs")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"one of {', '.join(TRAIN)}")
    parser.add_argument("--begin", type=Path, help="folder of weights to begin with")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    given = parser.parse_args()
    if unknown := set(given.networks) - set(TRAIN):
        names = ", ".join(sorted(unknown))
        parser.error(f"unknown network {names}: expected one of {', '.join(TRAIN)}")
    given.work.mkdir(parents=True, exist_ok=True)
    compile_blocks()
    begin = None if given.begin is None else read_weights(given.begin)
    losses = {} if given.begin is None else read_losses(given.begin)
    for name in given.networks or TRAIN:
        TRAIN[name](given.work, given.device, begin)
    if begin is not None or not given.networks:
        keep_weights(given.work, given.work / "weights", begin, losses)


if __name__ == "__main__":
    main()
