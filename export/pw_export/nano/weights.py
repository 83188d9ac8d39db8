# SPDX-License-Identifier: Apache-2.0
"""Files of the trained weights, and the checkpoint written from them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.checkpoint import NanoTensors, Tensors, write_checkpoint
from pw_export.nano.train_draft import DIT
from pw_export.nano.training import is_complete
from pw_runtime.checkpoint import keymaps
from pw_runtime.errors import BadWeights
from pw_runtime.system.atomic_files import write_tensors, write_text

FILES = ("draft", "highres", "vae", "text_encoder")
TRAININGS = ("draft", "highres", "decoder", "encoder")
LOSSES = "losses.json"
Losses = dict[str, list[dict[str, Any]]]
"""By training: step, mean loss and seconds of every few steps."""
TRAINED = Path(__file__).parent / "trained"  # part of the package


def write_trained_checkpoint(out: Path, folder: Path = TRAINED) -> None:
    """Write the trained model in the official layout. Raises what `write_checkpoint` raises."""
    write_checkpoint(out, DIT, read_weights(folder), make_tokenizer())


def read_weights(folder: Path) -> NanoTensors:
    """Read the files of `keep_weights`, as fp32. Raises BadWeights if one is missing."""
    if missing := [name for name in FILES if not (folder / f"{name}.safetensors").exists()]:
        raise BadWeights(
            f"{folder} lacks trained weights",
            got=f"no {', '.join(missing)}",
            wanted=f"a safetensors file for each of {', '.join(FILES)}",
            do="run python -m pw_export.nano.train until it is complete",
        )
    stored = {name: load_file(folder / f"{name}.safetensors") for name in FILES}
    return NanoTensors(**{name: _cast(tensors, torch.float32) for name, tensors in stored.items()})


def read_losses(folder: Path) -> Losses:
    """Read the losses that `keep_weights` wrote beside the weights. Raises BadWeights without."""
    if not (folder / LOSSES).exists():
        raise BadWeights(
            f"{folder} lacks the losses of its trainings",
            got=f"no {LOSSES}",
            wanted=f"the {LOSSES} that was written beside the weights",
            do="name a folder as python -m pw_export.nano.train writes it",
        )
    losses: Losses = json.loads((folder / LOSSES).read_text(encoding="utf-8"))
    return losses


def keep_weights(
    work: Path, folder: Path, begin: NanoTensors | None = None, losses: Losses | None = None
) -> None:
    """Write the averaged weights of all trainings, in fp16 with official names, and the losses.

    Args:
        work: folder of the trainings; of those in progress there, `begin` is written.
        folder: folder for a file per network and losses.json.
        begin: weights of the networks that were not trained there; None: all four were.
        losses: of the trainings of `begin`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = [name for name in TRAININGS if begin is None or is_complete(work, name)]
    for name, tensors in _trained(work, done, begin).items():
        write_tensors(folder / f"{name}.safetensors", _cast(tensors, torch.float16))
    kept = dict(losses or {})
    for name in done:
        rows = (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        kept[name] = [json.loads(row) for row in rows]
    parts = [
        f'"{name}": [\n' + ",\n".join(map(json.dumps, kept[name])) + "\n]"
        for name in TRAININGS
        if name in kept
    ]
    write_text(folder / LOSSES, "{\n" + ",\n".join(parts) + "\n}\n")


def _trained(work: Path, done: list[str], begin: NanoTensors | None) -> dict[str, Tensors]:
    """Collect the tensors of each network, with official names: those of `done` from its states."""
    states = {
        name: torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["average"]
        for name in done
    }
    tensors: dict[str, Tensors] = {} if begin is None else asdict(begin)
    if "draft" in states:
        text = _under("text.", states["draft"])
        tensors["draft"] = _under("dit.", states["draft"])
        tensors["text_encoder"] = {_official(name): tensor for name, tensor in text.items()}
    if "highres" in states:
        tensors["highres"] = states["highres"]
    coders = states.get("encoder", {}) | states.get("decoder", {})
    tensors["vae"] = tensors.get("vae", {}) | coders
    return tensors


def _under(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names start with `prefix`, and remove it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _official(name: str) -> str:
    official = keymaps.text_encoder_from_transformers(name)
    assert official is not None
    return official


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
