# SPDX-License-Identifier: Apache-2.0
"""Everything that decides a clip, compared with what files of earlier runs say about theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.job.clip import Clip
from pw_runtime.job.provenance import Provenance, source_digests
from pw_runtime.sampling.noise import tensor_digest

Fields = dict[str, Any]  # of JSON

# Options that decide the draft, further ones that decide the last latent, and those of the frames.
_OF_DRAFT: Final = (
    *("precision", "kernels", "attention", "chunk", "linear", "step_cache", "draft_strength"),
)
_OF_LATENTS: Final = (
    *_OF_DRAFT,
    *("draft_only", "sparse_attention", "guidance_reuse", "image_highres"),
)
_OF_DECODE: Final = ("codec", "vae_precision", "conv")
_OF_CLIP: Final = (*_OF_LATENTS, *_OF_DECODE)
# Options that came later, as they were before.
_SINCE: Final = {"linear": "exact", "step_cache": None, "sparse_attention": None}
_BEFORE: Final = {**_SINCE, "guidance_reuse": 0, "draft_strength": 0.0, "image_highres": False}
# Packages that compute; the others carry bytes from one place to another.
_COMPUTING: Final = ("pixelwizard-runtime", "torch", "tokenizers")
_SHOWN: Final = 40  # characters of a value in a message


def of_clip(clip: Clip) -> Fields:
    """Return what decides the clip's video, as a receipt stores it.

    Versions and machines are no part of it: a finished clip stays one when they change.
    """
    provenance = clip.provenance
    options = asdict(provenance.options)
    return _as_json(
        {
            "prompt": _prompt(asdict(provenance.prompt)),
            "sources": _encoded(provenance),
            "loras": _loras(asdict(provenance)["loras"]),
            "negative": provenance.negative,
            "seeds": provenance.seeds,
            "preset": asdict(provenance.preset),
            "options": {name: options[name] for name in _OF_CLIP},
            "bundle": provenance.bundle["digest"],
            "noise file": {stage: tensor_digest(x) for stage, x in clip.noise.items()},
        }
    )


def of_receipt(receipt: Mapping[str, Any]) -> Fields:
    """Return the same fields of a receipt. Raises KeyError for one of a clip that has them not."""
    finished = receipt.get("finished_from_latents", {})  # by `pw decode`, in its own way
    decode = {name: finished[name] for name in _OF_DECODE if name in finished}
    options = _BEFORE | receipt["options"] | decode
    sources = {kind: x["sha256"] for kind, x in receipt.get("sources", {}).items()}
    return {
        "prompt": _prompt(receipt["prompt"]),
        "sources": _with_conv(sources, receipt["options"]),
        "loras": _loras(receipt.get("loras", {})),
        "negative": receipt["negative"],
        "seeds": receipt["seeds"],
        "preset": receipt["preset"],
        "options": {name: options[name] for name in _OF_CLIP},
        "bundle": receipt["bundle"]["digest"],
        "noise file": receipt["noise"] if receipt["noise_file"] else {},
    }


def of_latents(provenance: Provenance, *, anywhere: bool = False) -> Fields:
    """Return what decides the bits of a clip's latents, but for the noise of a file.

    Codec, decoder and its tiling are no part of it. Versions, machine and engines are, except
    `anywhere`: half a clip of one and half of another would be a third one.
    """
    options, preset = asdict(provenance.options), asdict(provenance.preset)
    del preset["decode"]
    device = _device_type(provenance)
    machine = dict(provenance.machine)
    if device != "cpu":
        machine.pop("threads", None)
    fields = {
        "prompt": _prompt(asdict(provenance.prompt)),
        "sources": source_digests(provenance.sources) if anywhere else _encoded(provenance),
        "loras": _loras(asdict(provenance)["loras"]),
        "negative": provenance.negative,
        "seeds": provenance.seeds,
        "preset": preset,
        "options": {name: options[name] for name in _with_encoder(_OF_LATENTS, provenance)},
        "bundle": provenance.bundle["digest"],
    }
    if anywhere:
        return _as_json(fields)
    return _as_json(
        {
            **fields,
            "device": device,
            "engines": _engines(provenance),
            "versions": {name: provenance.versions.get(name) for name in _COMPUTING},
            "machine": machine,
        }
    )


def of_draft(provenance: Provenance, bundle: Bundle) -> Fields:
    """Return what a user decides about the bits of a clip's draft.

    Args:
        provenance: of its latents.
        bundle: names the files of the text encoder and of the draft network.
    """
    options, networks = asdict(provenance.options), bundle.networks
    others = {*networks.vae.files, *(networks.highres.files if networks.highres else ())}
    files = [name for name in bundle.files if name not in others]
    return _as_json(
        {
            "prompt": _prompt(asdict(provenance.prompt)),
            "sources": _encoded(provenance),
            "loras": _loras(asdict(provenance)["loras"]).get("draft", {}),
            "negative": provenance.negative,
            "seeds": provenance.seeds,
            "preset": {
                "draft": asdict(provenance.preset.draft),
                "video": asdict(provenance.preset.video),
                "compat": asdict(provenance.preset.compat),
            },
            "options": {name: options[name] for name in _with_encoder(_OF_DRAFT, provenance)},
            "device": _device_type(provenance),
            "bundle": {name: provenance.bundle.get(name) for name in files},
        }
    )


def _with_encoder(names: Sequence[str], provenance: Provenance) -> tuple[str, ...]:
    """Return the names of options, with that of the encoder where there was something for it."""
    return (*names, "conv") if provenance.sources else tuple(names)


def differences(found: Fields, wanted: Fields, where: str = "") -> list[str]:
    """Describe every field that differs, with both of its values."""
    texts = []
    for name in sorted({*found, *wanted}):
        ours, theirs = wanted.get(name), found.get(name)
        path = f"{where}{name}"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            texts += differences(theirs, ours, f"{path}.")
        elif ours != theirs:
            texts.append(f"{path} is {_shown(theirs)}, wanted {_shown(ours)}")
    return texts


def _prompt(prompt: Mapping[str, Any]) -> Fields:
    """Return a prompt without the paths of what it starts from, which have digests."""
    return {name: prompt[name] for name in ("text", "id", "position")}


def _encoded(provenance: Provenance) -> Fields:
    """Return the sources with what encoded them."""
    return _with_conv(source_digests(provenance.sources), asdict(provenance.options))


def _with_conv(sources: Fields, options: Fields) -> Fields:
    """Add the convolutions that encoded sources, which decide the last bits of their latents."""
    return sources | {"conv": options["conv"]} if sources else {}


def _loras(networks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Fields:
    """Return digest and scale of each network's LoRAs, by their numbers in order."""
    return {
        network: {
            str(number): {"sha256": lora["sha256"], "scale": lora["scale"]}
            for number, lora in enumerate(loras, start=1)
        }
        for network, loras in networks.items()
    }


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _device_type(provenance: Provenance) -> str:
    return provenance.options.device.partition(":")[0]


def _engines(provenance: Provenance) -> Fields:
    """Return the backends and digests of the transformers' engines."""
    return {
        network: {name: entry.get(name) for name in ("backend", "digest", "linear", "attention")}
        for network, entry in provenance.engines.items()
        if network != "vae"
    }


def _as_json(fields: Fields) -> Fields:
    return dict(json.loads(json.dumps(fields)))
