# SPDX-License-Identifier: Apache-2.0
"""Start `pw serve`, ask it for a clip over HTTP, follow the events of the job, fetch it, end it.

python examples/serve_and_call.py "a small green box rises at night"

It needs `pip install '.[serve]'`. The client is the standard library alone; the API is that of
OpenAI's /v1/videos, so that the official client works, too (`pw docs server`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from pw_export.bundle_cache import demo_bundle


@contextmanager
def served(model: Path, preset: str, root: Path, port: int) -> Iterator[str]:
    """Run a server; yield its address when it is ready for jobs."""
    command = [sys.executable, "-m", "pw_runtime", "serve", "--model", str(model),
               "--preset", preset, "--root", str(root), "--port", str(port)]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as server:
        try:
            while not ready(address):
                if server.poll() is not None:
                    raise SystemExit("the server ended before it was ready")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def ready(address: str) -> bool:
    """Tell whether a job would be made now."""
    try:
        with urlopen(f"{address}/ready"):
            return True
    except URLError:  # nobody listens yet, or the answer is 503
        return False


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a JSON request."""
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def events(url: str) -> Iterator[dict[str, Any]]:
    """Yield the states of a job as the server sends them; the stream ends with the job."""
    with urlopen(url) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                yield json.loads(line.removeprefix(b"data:"))


def main() -> None:
    """Serve, ask, follow, fetch."""
    parser = argparse.ArgumentParser(description="Make a clip by a server of one's own.")
    parser.add_argument("prompt")
    parser.add_argument("--model", type=Path, help="a bundle; default: the built-in model")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("clips/served.mp4"))
    given = parser.parse_args()

    model = given.model or demo_bundle(print)
    root = given.out.parent / "server"
    with served(model, given.preset, root, given.port) as address:
        job = post(f"{address}/v1/videos", {"prompt": given.prompt, "seed": 1})["id"]
        for video in events(f"{address}/v1/videos/{job}/events"):
            print(f"{video['status']} {video['stage'] or ''} {video['progress']} %", flush=True)
        if video["status"] != "completed":
            raise SystemExit(f"no clip: {video['error']}")
        with urlopen(f"{address}/v1/videos/{job}/content") as content:
            given.out.write_bytes(content.read())
    print(given.out)


if __name__ == "__main__":
    main()
