# SPDX-License-Identifier: Apache-2.0
"""Trained weights: how they are kept, and the checkpoint that they make."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pw_export import keymaps
from pw_export.nano.captions import make_tokenizer
from pw_export.nano.checkpoint import NanoTensors, Tensors, write_checkpoint
from pw_export.nano.train_draft import DIT
from pw_runtime.errors import BadWeights
from pw_runtime.models.text_encoder import TIED_KEY
from pw_runtime.system.atomic_files import write_tensors, write_text

FILES = ("draft", "highres", "vae", "text_encoder")
TRAININGS = ("draft", "highres", "decoder", "encoder")
TRAINED = Path(__file__).parent / "trained"  # comes with the package


def write_trained_checkpoint(out: Path, folder: Path = TRAINED) -> None:
    """Write the trained model in the official layout; see `write_checkpoint`."""
    write_checkpoint(out, DIT, read_weights(folder), make_tokenizer())


def read_weights(folder: Path) -> NanoTensors:
    """What `keep_weights` has kept, in fp32. Raises BadWeights where a file is missing."""
    if missing := [name for name in FILES if not (folder / f"{name}.safetensors").exists()]:
        raise BadWeights(
            f"{folder} has not all trained weights",
            got=f"no {', '.join(missing)}",
            wanted=f"a safetensors file for each of {', '.join(FILES)}",
            do="run python -m pw_export.nano.train to its end",
        )
    kept = {name: load_file(folder / f"{name}.safetensors") for name in FILES}
    return NanoTensors(**{name: _cast(tensors, torch.float32) for name, tensors in kept.items()})


def keep_weights(work: Path, folder: Path) -> None:
    """Write the averaged weights of all trainings, in fp16 under official names, and the losses.

    Args:
        work: where the training programs have run to their ends.
        folder: where a file for each network is written, and losses.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in _trained(work).items():
        write_tensors(folder / f"{name}.safetensors", _cast(tensors, torch.float16))
    kept = []
    for name in TRAININGS:
        rows = (work / f"{name}.jsonl").read_text().strip().replace("\n", ",\n")
        kept.append(f'"{name}": [\n{rows}\n]')
    write_text(folder / "losses.json", "{\n" + ",\n".join(kept) + "\n}\n")


def _trained(work: Path) -> dict[str, Tensors]:
    """Tensors of each network under official names."""
    states = {
        name: torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["average"]
        for name in TRAININGS
    }
    text = _under("text.", states["draft"])
    text["shared.weight"] = text.pop(TIED_KEY)  # the same table; training knows it by this name
    return {
        "draft": _under("dit.", states["draft"]),
        "highres": states["highres"],
        "vae": states["encoder"] | states["decoder"],
        "text_encoder": {_official(name): tensor for name, tensor in text.items()},
    }


def _under(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with `prefix`, without it."""
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in inside.items()}


def _official(name: str) -> str:
    official = keymaps.text_encoder_from_transformers(name)
    assert official is not None
    return official


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
