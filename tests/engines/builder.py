# SPDX-License-Identifier: Apache-2.0
"""A process that builds an engine, step by step, for test_store.py.

    builder.py ROOT wait|try

Prints what it has come to, and goes on when a line comes on standard input: nobody sleeps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pw_engines.store import EngineStore
from tests.engines.small import key


def step(reached: str) -> None:
    print(reached, flush=True)
    sys.stdin.readline()


def main() -> None:
    store = EngineStore(Path(sys.argv[1]))
    with store.locked(key(), wait=sys.argv[2] == "wait") as mine:
        if not mine:
            print("taken", flush=True)
            return
        if store.find(key()).state == "fresh":
            print("fresh", flush=True)
            return
        step("locked")
        with store.publishing(key(), "engine.bin") as path:
            path.write_bytes(b"half")
            step("half")
            path.write_bytes(b"whole engine")
    print("published", flush=True)


if __name__ == "__main__":
    main()
