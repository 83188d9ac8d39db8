#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Compile a model's networks, and make a clip on the engines; see what they are, and check them.
#
#   examples/build_engines.sh                          # the built-in model, as `make demo` writes it
#   examples/build_engines.sh bundle-2k 2k clips-2k
#   examples/build_engines.sh build/demo/nano nano clips --backend openvino   # the rest goes to `pw build`
#
# Engines serve every preset of their model, and lie in $PW_CACHE/engines (default ~/.cache/pixelwizard).
set -euo pipefail
model=${1:-build/demo/nano} preset=${2:-nano} out=${3:-clips/engines}

pw build --model "$model" "${@:4}" --dry-run
pw build --model "$model" "${@:4}"
pw engines list
pw engines verify
# --policy engines: without engines this ends with an error, where auto would run uncompiled.
pw generate --model "$model" --preset "$preset" --policy engines --out "$out" \
  --prompt "a big red ball drifts to the right over a meadow"
