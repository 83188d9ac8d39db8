# SPDX-License-Identifier: Apache-2.0
"""The places of Wan2.2-TI2V-5B's networks in a folder: official, diffusers or single files.

Each network is looked for by itself, so a folder may mix the layouts. Single files are recognised
by the names of their tensors, whatever the files are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os.path import lexists  # a link whose target is missing is named, not passed over
from pathlib import Path

from pw_export.checkpoints.file_kinds import form_of, listing, require_regular
from pw_export.checkpoints.fp8 import unused_names
from pw_export.checkpoints.members import unprefixed
from pw_export.checkpoints.network_kinds import Kind, Role, kind_of
from pw_export.checkpoints.parts import Part, text_encoder_part, transformer_refs, vae_part
from pw_export.checkpoints.sources import open_safetensors, read_network, read_shards
from pw_export.checkpoints.tensor_refs import Refs, shapes_of
from pw_export.checkpoints.upstream_configs import (
    ConfigFields,
    diffusers_dit,
    diffusers_vae,
    official_dit,
    transformers_text_encoder,
)
from pw_export.wan22_configs import LATENT_MEAN
from pw_runtime.checkpoint.bundle import MANIFEST, some_names
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.types import TextEncoderConfig, VaeConfig

_DIT_STEM = "diffusion_pytorch_model"
_VAE = "Wan2.2_VAE.pth"
_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
# Folders of single files, as ComfyUI and its repackagers name them.
_PARENTS = ("", "split_files", "models")
_FOLDERS = ("", "diffusion_models", "unet", "vae", "text_encoders", "clip")
SINGLE_FILES = (".safetensors", ".sft")
_OTHER_WEIGHTS = (".gguf", ".pth", ".pt", ".bin", ".ckpt")  # named where nothing is found
_TOKENIZERS = ("google/umt5-xxl", "tokenizer", "umt5-xxl", "text_encoders/tokenizer", "")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_LOOKED_FOR: dict[Role, str] = {
    "transformer": f"{_DIT_STEM}*.safetensors, transformer/",
    "VAE": f"{_VAE}, vae/ with config.json",
    "text encoder": f"{_TEXT_ENCODER}, text_encoder/",
}
_DIFFUSERS: dict[Role, str] = {
    "transformer": "transformer",
    "VAE": "vae",
    "text encoder": "text_encoder",
}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Wan2.2-TI2V-5B in a folder, checked except for its transformer.

    Attributes:
        layout: how the transformer is stored.
        config: the transformer's config file, or None where the layout has none.
        fields: its content.
        dit: opens the transformer; its files may be missing if a draft checkpoint replaces it.
    """

    layout: str
    config: Path | None
    fields: ConfigFields
    dit: Callable[[], tuple[Path, Refs]]
    vae: Part[VaeConfig]
    text_encoder: Part[TextEncoderConfig]
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class _Single:
    """A weight file; `kind` is what it holds if it is safetensors and known."""

    path: Path
    what: str
    kind: Kind | None
    channels: int = 0  # latent channels of a transformer


def open_base(wan: Path, say: Say) -> Base:
    """Find and open the networks in a folder.

    Raises BadRequest for a path that is no checkpoint folder, BadWeights for a network that is
    missing, there twice, damaged or contradictory.
    """
    _require_checkpoint_folder(wan)
    singles = _single_files(wan)
    if not singles and not _is_marked(wan):
        inside = [path for path in (*wan.glob("*"), *wan.glob("snapshots/*")) if _is_marked(path)]
        raise BadWeights(
            f"{wan} is not a checkpoint of a known layout",
            got=listing(wan),
            wanted="the folder of Wan2.2-TI2V-5B as published by Wan-AI, its diffusers form, or "
            "ComfyUI's folders",
            do=f"pass {inside[0]}"
            if inside
            else "check the path, or download the whole folder again",
        )
    official = any(wan.glob(f"{_DIT_STEM}*"))
    if (wan / "transformer").is_dir() and not official:
        layout, config = "diffusers", wan / "transformer" / "config.json"
        fields = diffusers_dit(config)
    else:
        layout = "official" if official else "single files"
        config = wan / "config.json"
        fields = official_dit(config) if lexists(config) else {}
    return Base(
        layout=layout,
        config=config if fields else None,
        fields=fields,
        dit=lambda: _open_dit(wan, layout, singles, say),
        vae=_open_vae(wan, singles, say),
        text_encoder=_open_text_encoder(wan, singles, say),
        tokenizer=_tokenizer(wan),
    )


def _require_checkpoint_folder(wan: Path) -> None:
    if not wan.is_dir():
        is_file = wan.exists()
        raise BadRequest(
            f"there is no checkpoint folder {wan}",
            got="a file" if is_file else "no such folder",
            wanted="the folder of Wan2.2-TI2V-5B",
            do="pass the folder of all networks; a single transformer is a --draft"
            if is_file
            else "check the path",
        )
    if (wan / MANIFEST).exists():
        raise BadRequest(
            f"{wan} is already a bundle",
            got=f"a folder with {MANIFEST}",
            wanted="the folder of Wan2.2-TI2V-5B",
            do="use it without converting",
        )


def _is_marked(folder: Path) -> bool:
    marks = ("config.json", "transformer", _VAE, _TEXT_ENCODER)
    return any(lexists(folder / mark) for mark in marks)


def _open_dit(wan: Path, layout: str, singles: list[_Single], say: Say) -> tuple[Path, Refs]:
    if layout == "single files":
        file = _pick("transformer", wan, singles, say)
        return file, transformer_refs(file, read_network(file, say))
    published = {"official": f"{_DIT_STEM}*", "diffusers": "transformer/"}
    _tell_others("transformer", wan, published[layout], singles, say)
    folder = wan if layout == "official" else wan / "transformer"
    what = folder / f"{_DIT_STEM}*"
    return what, transformer_refs(what, read_shards(folder, _DIT_STEM, say))


def _open_vae(wan: Path, singles: list[_Single], say: Say) -> Part[VaeConfig]:
    folder = wan / "vae"
    if lexists(wan / _VAE):
        _tell_others("VAE", wan, _VAE, singles, say)
        return vae_part(wan / _VAE, read_network(wan / _VAE, say), {})
    if lexists(folder / "config.json"):
        _tell_others("VAE", wan, "vae/", singles, say)
        fields = diffusers_vae(folder / "config.json")
        return vae_part(folder, read_shards(folder, _DIT_STEM, say), fields)
    file = _pick("VAE", wan, singles, say)
    return vae_part(file, read_network(file, say), {})


def _open_text_encoder(wan: Path, singles: list[_Single], say: Say) -> Part[TextEncoderConfig]:
    folder = wan / "text_encoder"
    if lexists(wan / _TEXT_ENCODER):
        _tell_others("text encoder", wan, _TEXT_ENCODER, singles, say)
        file = wan / _TEXT_ENCODER
        return text_encoder_part(file, read_network(file, say), {})
    if folder.is_dir():
        _tell_others("text encoder", wan, "text_encoder/", singles, say)
        fields = transformers_text_encoder(folder / "config.json")
        return text_encoder_part(folder, read_shards(folder, "model", say), fields)
    file = _pick("text encoder", wan, singles, say)
    return text_encoder_part(file, read_network(file, say), {})


def _tell_others(role: Role, wan: Path, taken: str, singles: list[_Single], say: Say) -> None:
    """Say which other layouts of a network the folder has, beside the one that is taken."""
    folder = _DIFFUSERS[role]
    has_diffusers = lexists(wan / folder / "config.json")
    others = [f"{folder}/"] if has_diffusers and taken != f"{folder}/" else []
    for single in singles:
        ours = role != "transformer" or single.channels == len(LATENT_MEAN)
        inside = has_diffusers and single.path.parent == wan / folder
        if single.kind and single.kind.role == role and ours and not inside:
            others.append(str(single.path.relative_to(wan)))
    if others:
        say(f"{role}: {taken}, not {some_names(others)}")


def source_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a conversion may read, by name."""
    inside = {*_FOLDERS, *_TOKENIZERS, *_DIFFUSERS.values()}
    kinds = (*SINGLE_FILES, *_OTHER_WEIGHTS, ".json", ".model")
    files = [
        file
        for parent in _PARENTS
        for name in inside
        for file in (folder / parent / name).glob("*")
        if file.suffix in kinds
    ]
    return sorted(set(files))


def _single_files(wan: Path) -> list[_Single]:
    """List the weight files in the folders of single files, with what each holds."""
    official = {wan / _VAE, wan / _TEXT_ENCODER, *wan.glob(f"{_DIT_STEM}*")}
    files = {
        file
        for parent in _PARENTS
        for folder in _FOLDERS
        for file in (wan / parent / folder).glob("*")
        if file.suffix in (*SINGLE_FILES, *_OTHER_WEIGHTS) and file not in official
    }
    return [_single(file) for file in sorted(files)]


def _single(file: Path) -> _Single:
    try:
        if form_of(file) != "safetensors":
            return _Single(file, "a PyTorch checkpoint, read under its published name only", None)
        refs = open_safetensors(file)
        for name in unused_names(refs):  # they may stand outside the prefix of the others
            del refs[name]
        refs = unprefixed(file, refs, lambda line: None)
    except BadWeights as error:  # it may be none of ours; named where nothing else is found
        return _Single(file, str(error.got), None)
    kind = kind_of(shapes_of(refs))
    embedding = refs.get("patch_embedding.weight")
    channels = embedding.shape[1] if embedding and len(embedding.shape) == 5 else 0
    return _Single(file, kind.what if kind else "unknown tensors", kind, channels)


def _pick(role: Role, wan: Path, singles: list[_Single], say: Say) -> Path:
    """Return the only single file of a role; of several transformers, the only one of TI2V-5B.

    Raises BadWeights where there is none or several.
    """
    found = [single for single in singles if single.kind and single.kind.role == role]
    files = [single.path for single in found]
    if len(files) == 1:
        return files[0]
    ours = [single.path for single in found if single.channels == len(LATENT_MEAN)]
    if len(ours) == 1:
        rest = [str(file.relative_to(wan)) for file in files if file != ours[0]]
        say(f"{ours[0].relative_to(wan)}: the only one of TI2V-5B, not {some_names(rest)}")
        return ours[0]
    wanted = f"{_LOOKED_FOR[role]}, or a .safetensors file of it in {wan} or a folder in it named "
    wanted += ", ".join(folder for folder in _FOLDERS if folder)
    if files:
        raise BadWeights(
            f"{wan} holds more than one {role}",
            got=some_names([str(file.relative_to(wan)) for file in files]),
            wanted="one",
            do="move the others out of the folder",
        )
    there = [f"{single.path.relative_to(wan)} ({single.what})" for single in singles]
    raise BadWeights(
        f"{wan} holds no {role} of Wan2.2-TI2V-5B",
        got=f"{listing(wan)}" + (f"; of these {some_names(there)}" if there else ""),
        wanted=wanted,
        do="check the path, or download the missing file into the folder",
    )


def _tokenizer(wan: Path) -> Path:
    """Return the folder of the tokenizer. Raises BadWeights."""
    folders = [wan / parent / folder for parent in _PARENTS for folder in _TOKENIZERS]
    for folder in folders:
        if found := [folder / name for name in _TOKENIZER_FILES if lexists(folder / name)]:
            for file in found:
                require_regular(file)
            return folder
    first = wan / _TOKENIZERS[0]
    raise BadWeights(
        f"{wan} contains no tokenizer",
        got=f"{first.relative_to(wan)} with {listing(first)}" if first.is_dir() else listing(wan),
        wanted=f"{' or '.join(_TOKENIZER_FILES)} in {_TOKENIZERS[0]} or {_TOKENIZERS[1]}",
        do="download the folder google/umt5-xxl of Wan-AI/Wan2.2-TI2V-5B into it (a tokenizer "
        "inside a text encoder's file is not read)",
    )
