#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5: T5Tokenizer gives other token ids than the tokenizer.json that it was loaded from.
#
# A good guess: a folder with a tokenizer.json is read by the tokenizers library as it is, as in
# transformers 4, so AutoTokenizer and Tokenizer.from_file give the same ids.
# What happens: where tokenizer_config.json names the class T5Tokenizer, the tokenizer is built anew from
# the vocabulary, with byte_fallback=False and a pre-tokenizer of its own, without a warning. Characters
# outside the vocabulary, which the file divides into bytes, become <unk>.
# Whom it hurts: prompts in text-to-image and text-to-video models with a T5 encoder. Read tokenizer.json
# with `tokenizers` itself, or name PreTrainedTokenizerFast in tokenizer_config.json.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet transformers==5.24.0 tokenizers==0.23.3
cat > "$work/ids.py" <<'PY'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0), ("▁caf", -4.0)]
pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
)
tokenizer.save(str(folder / "tokenizer.json"))
ids = {"tokenizers": Tokenizer.from_file(str(folder / "tokenizer.json")).encode("café").ids}
for name in ("PreTrainedTokenizerFast", "T5Tokenizer"):
    settings = {"tokenizer_class": name, "unk_token": "<unk>", "eos_token": "</s>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ids[name] = AutoTokenizer.from_pretrained(folder, local_files_only=True)("café").input_ids
print("transformers", transformers.__version__)
for name, numbers in ids.items():
    print(f"{name}: {numbers}")
assert ids["PreTrainedTokenizerFast"] == ids["tokenizers"]
assert ids["T5Tokenizer"] != ids["tokenizers"], "the file is read as it is now"
PY
mkdir "$work/tokenizer"
"$work/venv/bin/python" "$work/ids.py" "$work/tokenizer"
