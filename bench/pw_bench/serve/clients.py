# SPDX-License-Identifier: Apache-2.0
"""Clients of a server under test: plain sockets, which cost little beside what they measure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pw_runtime.errors import BadResult


@dataclass(slots=True)
class Asked:
    """Requests of several clients.

    Attributes:
        seconds: of every answer.
        wall: from the first request to the last answer.
    """

    seconds: list[float] = field(default_factory=list)
    wall: float = 0.0


async def poll(url: str, path: str, clients: int, pause: float, until: Callable[[], bool]) -> Asked:
    """Let clients ask again and again, each on a connection of its own.

    Args:
        url: of the server.
        path: that they ask for.
        clients: number of them.
        pause: seconds of each between an answer and its next request; 0: none.
        until: tells when they are to end.

    Raises BadResult for an answer that is an error.
    """
    asked, began = Asked(), time.perf_counter()

    async def ask_on(number: int) -> None:
        reader, writer = await _connected(url)
        try:
            await asyncio.sleep(pause * number / clients)
            while not until():
                start = time.perf_counter()
                await _get(url, path, reader, writer)
                asked.seconds.append(time.perf_counter() - start)
                await asyncio.sleep(pause)
        finally:
            writer.close()

    await asyncio.gather(*(ask_on(number) for number in range(clients)))
    asked.wall = time.perf_counter() - began
    return asked


async def listen(url: str, path: str, streams: int) -> list[float]:
    """Read as many event streams to their end; return when each ended, by `time.perf_counter`."""

    async def one() -> float:
        reader, writer = await _connected(url)
        try:
            _request(url, path, writer)
            await reader.readuntil(b"\r\n\r\n")
            last = b""
            while line := await reader.readline():
                last = line if line.startswith(b"data:") else last
                if b'"status":"completed"' in last:
                    break
            else:
                raise BadResult("a stream ended before its job", got=last[:200].decode())
            return time.perf_counter()
        finally:
            writer.close()

    return list(await asyncio.gather(*(one() for _ in range(streams))))


async def _connected(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(url)
    return await asyncio.open_connection(address.hostname, address.port, limit=2**20)


def _request(url: str, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode())


async def _get(
    url: str, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    _request(url, path, writer)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise BadResult(f"{path} was refused", got=head.split(b"\r\n")[0].decode())
    length = next(
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    await reader.readexactly(length)
