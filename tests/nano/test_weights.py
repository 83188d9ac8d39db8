# SPDX-License-Identifier: Apache-2.0
"""From the states of trainings to files, to a checkpoint, to a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pw_export.nano import train
from pw_export.nano.captions import vocabulary
from pw_export.nano.checkpoint import Tensors
from pw_export.nano.train_draft import DIT, TEXT_ENCODER, TextToLatent
from pw_export.nano.train_highres import HIGHRES, initial_highres
from pw_export.nano.train_vae import DECODER_PARTS, ENCODER_PARTS, VAE, initialise, part
from pw_export.nano.weights import (
    FILES,
    keep_weights,
    read_losses,
    read_weights,
    write_trained_checkpoint,
)
from pw_runtime.checkpoint.bundle import Bundle, load_tensors, verify
from pw_runtime.checkpoint.loader import load_tokenizer
from pw_runtime.errors import BadWeights
from pw_runtime.models import VaeDecoder
from pw_runtime.models.vae import VaeEncoder
from pw_runtime.stages.text import tokenize
from pw_runtime.types import OFFICIAL_NEGATIVE
from tests.convert.layouts import quietly


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write states as the training programs do before their first step."""
    folder = tmp_path_factory.mktemp("work")
    both, generator = TextToLatent(DIT, TEXT_ENCODER), torch.Generator().manual_seed(0)
    trained: dict[str, nn.Module] = {"draft": both, "decoder": VaeDecoder(VAE)}
    trained |= {"encoder": VaeEncoder(VAE), "highres": initial_highres(both.dit.state_dict())}
    for name, modules in trained.items():
        if name.endswith("coder"):
            initialise(modules, generator)
        state = {"step": 20, "steps": 20, "average": modules.state_dict()}
        torch.save(state, folder / f"{name}.pt")
        (folder / f"{name}.jsonl").write_text('{"step": 20, "loss": 0.5, "seconds": 1.5}\n')
    keep_weights(folder, folder / "kept")
    return folder


@pytest.fixture(scope="module")
def bundle(work: Path) -> Bundle:
    write_trained_checkpoint(work / "checkpoint", work / "kept")
    checkpoint = work / "checkpoint"
    return quietly(work / "bundle", wan=checkpoint, highres=checkpoint / "pixelwizard/highres.pt")


def test_kept_files_are_small_and_hold_every_network(work: Path) -> None:
    files = [work / "kept" / f"{name}.safetensors" for name in FILES]
    assert sum(file.stat().st_size for file in files) <= 40e6
    tensors = read_weights(work / "kept").draft
    state = torch.load(work / "draft.pt", weights_only=True)["average"]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[f"dit.{name}"].half().float())


def test_losses_of_all_trainings_are_kept(work: Path) -> None:
    losses = json.loads((work / "kept" / "losses.json").read_text())
    assert losses == {
        name: [{"step": 20, "loss": 0.5, "seconds": 1.5}]
        for name in ("draft", "highres", "decoder", "encoder")
    }


def test_networks_that_were_not_trained_anew_are_written_as_they_were(
    work: Path, tmp_path: Path
) -> None:
    before = read_weights(work / "kept")
    state = torch.load(work / "highres.pt", weights_only=True)
    state["average"] = {name: tensor + 1 for name, tensor in state["average"].items()}
    torch.save(state, tmp_path / "highres.pt")
    (tmp_path / "highres.jsonl").write_text('{"step": 20, "loss": 0.25, "seconds": 2.5}\n')
    keep_weights(tmp_path, tmp_path / "kept", before, read_losses(work / "kept"))
    same = {
        name: (tmp_path / "kept" / name).read_bytes() == (work / "kept" / name).read_bytes()
        for name in (f"{name}.safetensors" for name in FILES)
    }
    assert [name for name, equal in same.items() if not equal] == ["highres.safetensors"]
    losses = read_losses(tmp_path / "kept")
    assert losses["highres"] == [{"step": 20, "loss": 0.25, "seconds": 2.5}]
    assert losses["draft"] == read_losses(work / "kept")["draft"]


def test_a_training_in_progress_is_not_written(work: Path, tmp_path: Path) -> None:
    state = torch.load(work / "highres.pt", weights_only=True)
    state["average"] = {name: tensor + 1 for name, tensor in state["average"].items()}
    torch.save(state | {"step": 19}, tmp_path / "highres.pt")
    keep_weights(
        tmp_path, tmp_path / "kept", read_weights(work / "kept"), read_losses(work / "kept")
    )
    for name in FILES:
        written, before = (x / "kept" / f"{name}.safetensors" for x in (tmp_path, work))
        assert written.read_bytes() == before.read_bytes()


def test_a_network_learns_from_others_as_they_are_in_the_weights_to_begin_with(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, teachers = read_weights(work / "kept"), list[Tensors]()
    for name in ("highres", "encoder"):
        monkeypatch.setattr(train, f"train_{name}", lambda work, other, **_: teachers.append(other))
        train.TRAIN[name](tmp_path, torch.device("cpu"), begin)
    TextToLatent(DIT, TEXT_ENCODER).load_state_dict(teachers[0])
    VaeDecoder(VAE).load_state_dict(teachers[1])
    for name, weight in begin.draft.items():
        assert torch.equal(teachers[0][f"dit.{name}"], weight)
    assert all(torch.equal(weight, begin.vae[name]) for name, weight in teachers[1].items())


def test_encoder_and_decoder_begin_with_their_parts_of_the_weights(work: Path) -> None:
    vae = read_weights(work / "kept").vae
    VaeEncoder(VAE).load_state_dict(part(vae, ENCODER_PARTS))
    VaeDecoder(VAE).load_state_dict(part(vae, DECODER_PARTS))
    assert vae.keys() == {*part(vae, ENCODER_PARTS), *part(vae, DECODER_PARTS)}


def test_a_folder_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match=r"no losses\.json"):
        read_losses(tmp_path)


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="no draft, highres, vae, text_encoder"):
        write_trained_checkpoint(tmp_path / "checkpoint", tmp_path)


def test_trained_checkpoint_converts_to_the_networks_that_were_trained(bundle: Bundle) -> None:
    verify(bundle)
    networks = bundle.networks
    assert networks.draft.config == DIT
    assert networks.highres is not None
    assert networks.highres.config == HIGHRES
    assert networks.vae.config == VAE
    assert networks.text_encoder.config == TEXT_ENCODER


def test_the_table_of_words_is_the_one_that_training_changes(work: Path, bundle: Bundle) -> None:
    state = torch.load(work / "draft.pt", weights_only=True)["average"]
    trained = state["text.shared.weight"].half().float()
    assert torch.equal(load_tensors(bundle, "text_encoder")["shared.weight"].float(), trained)


def test_the_tokenizer_of_the_bundle_knows_the_words_of_the_grammar(bundle: Bundle) -> None:
    tokenizer = load_tokenizer(bundle, TEXT_ENCODER.vocab_size)
    tokens = tokenizer.encode("A small red ball rises, at NIGHT.", 32)
    assert len(tokens.ids) == 8
    assert not tokens.unknown
    assert tokenizer.size == len(vocabulary()) + 3


def test_words_that_no_caption_has_are_reported(bundle: Bundle) -> None:
    tokenizer = load_tokenizer(bundle, TEXT_ENCODER.vocab_size)
    notices: list[str] = []
    tokenize("A red dragon rises at night, dragon!", tokenizer, 32, notices.append)
    tokenize(OFFICIAL_NEGATIVE, tokenizer, 32, notices.append)
    assert notices == ["words not in this model's vocabulary: dragon"]
