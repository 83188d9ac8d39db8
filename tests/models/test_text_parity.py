# SPDX-License-Identifier: Apache-2.0
"""The text encoder and the tokenizer against those of transformers, a second implementation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import AutoTokenizer

from pw_bench.e2e.diffusers_networks import umt5_encoder
from pw_export import wan22_configs
from pw_export.nano.captions import make_tokenizer
from pw_export.nano.checkpoint import write_tokenizer
from pw_export.nano.random_weights import NANO_TEXT_ENCODER, write_byte_tokenizer
from pw_runtime.checkpoint import keymaps
from pw_runtime.models.text_encoder import TextEncoder, encode_tokens
from pw_runtime.models.tokenizer import TextTokenizer, build_tokenizer
from pw_runtime.types import TextEncoderConfig
from tests.oracle.checkpoint import write_tokenizer as write_unigram

UMT5_XXL = replace(wan22_configs.TEXT_ENCODER, num_layers=1, vocab_size=100)  # full widths
EXTRA = [f"<extra_id_{i}>" for i in range(300)]
TEXTS = (
    "",
    "A big red ball drifts to the right over grass.",
    "zebra, a zebra and an xyzzy ball",
    "  spaces   before and after  ",
    "日本語のテキスト 🦊 naïve café e\u0301 ﷽",
    "\u200b zero width, ﬁ ligature, ①",
    "</s> in a text </s>, and at its end</s>",
    "<extra_id_0> a <extra_id_299><pad><unk> <s>",
    "<extra_id_7 is none",
    "▁ under ▁",
    "word " * 511,
    "word " * 512,
    "a red ball " * 300,
    "x" * 2000,
)


def pair(config: TextEncoderConfig, dtype: torch.dtype) -> tuple[torch.nn.Module, TextEncoder]:
    """Return their encoder and ours, with the same random weights."""
    with torch.device("meta"):
        theirs, ours = umt5_encoder(config), TextEncoder(config)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, weight in ours.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            noise = 1 + 0.1 * noise
        elif "shared" not in name and "bias" not in name:
            noise *= (0.3 if ".q." in name or ".k." in name else 1.0) / weight.shape[1] ** 0.5
        weights[name] = noise.to(dtype)
    ours.load_state_dict(weights, assign=True)
    alias, table = keymaps.TEXT_ENCODER_ALIAS
    theirs.load_state_dict(weights | {alias: weights[table]}, assign=True)
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (NANO_TEXT_ENCODER, (1, 2, 33, 300, 512)),
        pytest.param(UMT5_XXL, (40,), marks=pytest.mark.slow),
    ],
    ids=["built-in model", "UMT5-XXL"],
)
def test_hidden_states_have_the_bits_of_transformers(
    config: TextEncoderConfig, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    theirs, ours = pair(config, dtype)
    for length in lengths:
        ids = torch.arange(length) * 7 % config.vocab_size
        wanted = theirs(input_ids=ids[None]).last_hidden_state[0]
        assert wanted.dtype == dtype
        assert wanted.float().std() > 0.5
        assert torch.equal(encode_tokens(ours, ids), wanted)


def test_padded_texts_have_the_bits_of_transformers() -> None:
    theirs, ours = pair(NANO_TEXT_ENCODER, torch.float32)
    ids = torch.arange(60).view(3, 20)
    mask = torch.arange(20) < torch.tensor([[7], [20], [1]])
    wanted = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(ours(ids, mask)[mask], wanted[mask])


def write_pieces(folder: Path, *, complete: bool) -> None:
    """Write a Unigram tokenizer like UMT5's: pieces of words, 300 extra tokens, NFKC, no bytes.

    An incomplete tokenizer.json lacks the extra tokens that tokenizer_config.json names.
    """
    tokenizer = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    corpus = ["a red ball drifts over the sea", "naïve café 日本語", "word spaces before and after"]
    tokenizer.train_from_iterator(corpus * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {name: f"<{name}>" for name in ("pad", "unk")} | {"eos": "</s>", "bos": "<s>"}
    settings: dict[str, object] = {f"{name}_token": token for name, token in names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": EXTRA}
    if complete:
        tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in EXTRA])
        flags = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
        settings["added_tokens_decoder"] = {
            str(number): {flag: getattr(token, flag) for flag in flags}
            for number, token in tokenizer.get_added_tokens_decoder().items()
        }
    tokenizer.enable_truncation(20)  # settings of the file that must not act
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


WRITERS = {
    "words": lambda folder: write_tokenizer(folder, make_tokenizer(), 32),
    "bytes": lambda folder: write_byte_tokenizer(folder, 512),
    "byte fallback": write_unigram,
    "pieces": lambda folder: write_pieces(folder, complete=True),
    "tokens of the settings alone": lambda folder: write_pieces(folder, complete=False),
}


def read(folder: Path) -> TextTokenizer:
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return build_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), settings)


@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), read(tmp_path)
    assert ours.size == len(theirs)
    assert ours.unknown == theirs.unk_token_id == 2
    for text in TEXTS:
        whole = theirs(text, verbose=False)
        numbers = [i for i, token in enumerate(whole.input_ids) if token == theirs.unk_token_id]
        spans = [whole.token_to_chars(i) for i in numbers]
        unknown = tuple(dict.fromkeys(text[span.start : span.end] for span in spans))
        for limit in (512, 32, 2):
            ids = theirs(text, truncation=True, max_length=limit).input_ids
            tokens = ours.encode(text, limit)
            assert tokens.ids == tuple(ids), text
            assert tokens.ids[-1] == 1
            assert len(tokens.ids) <= limit
            assert tokens.whole == len(whole.input_ids)
            assert tokens.unknown == unknown


def test_a_special_token_with_another_id_than_declared_is_an_error(tmp_path: Path) -> None:
    write_pieces(tmp_path, complete=True)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["added_tokens_decoder"]["5"] = {"content": "<unk>", "special": True}
    file.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=r"<unk> is token 2 of tokenizer\.json and 5"):
        read(tmp_path)
