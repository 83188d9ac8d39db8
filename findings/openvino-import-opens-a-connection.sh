#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# OpenVINO: importing the package looks up the address of an analytics service.
#
# A good guess: `import openvino` loads a library, and nothing is sent before something is asked of it.
# What happens: openvino_telemetry, which pip installs with it, is started by the import: the address of
# www.google-analytics.com is looked up, in a forked process, before a model is read. Nothing is printed. With the module hidden,
# OpenVINO works the same and no socket is used.
# Whom it hurts: programs that promise to need no network, and machines where looking up a name takes
# seconds to fail.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet openvino==2026.4.1 openvino-telemetry==2025.2.0
cat > "$work/watch.py" <<'PY'
import sys


def watch(event, args):
    if event == "socket.getaddrinfo":  # in a fork, which holds the same output
        print("  looks up", args[0], flush=True)


sys.addaudithook(watch)
if sys.argv[1] == "hidden":
    sys.modules["openvino_telemetry"] = None
import openvino  # noqa: E402

print("  devices", openvino.Core().available_devices, flush=True)
PY
installed=$("$work/venv/bin/python" "$work/watch.py" installed 2>/dev/null)
hidden=$("$work/venv/bin/python" "$work/watch.py" hidden)
printf 'openvino_telemetry installed:\n%s\nhidden:\n%s\n' "$installed" "$hidden"
[[ $installed == *"looks up"* && $hidden != *"looks up"* ]]
