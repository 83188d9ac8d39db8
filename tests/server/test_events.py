# SPDX-License-Identifier: Apache-2.0
"""Event streams: every change, the newest state, an end."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.server.servers import PATIENCE, Served, serving


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kind and the data of every event."""
    kind = ""
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def test_a_stream_of_a_job_ends_with_it(shared: Served) -> None:
    video = shared.create()
    with shared.http.stream("GET", f"/v1/videos/{video['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer))
    assert {kind for kind, _ in told} == {"video"}
    assert {data["id"] for _, data in told} == {video["id"]}
    assert told[-1][1]["status"] == "completed"
    progress = [data["progress"] for _, data in told]
    assert progress == sorted(progress)


def test_a_stream_of_a_job_that_has_ended_has_its_last_state_alone(shared: Served) -> None:
    video = shared.until_ended(shared.create()["id"])
    with shared.http.stream("GET", f"/v1/videos/{video['id']}/events") as answer:
        assert [data["status"] for _, data in events(answer)] == ["completed"]


def test_a_stream_of_nothing_is_an_error(shared: Served) -> None:
    assert shared.error("GET", "/v1/videos/video_" + "0" * 32 + "/events")[0] == 404


def test_one_stream_has_all_jobs_also_their_removal(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served, served.http.stream("GET", "/v1/events") as answer:
        told = events(answer)
        video = httpx.post(f"{served.url}/v1/videos", json={"prompt": "hold"}).json()
        stages = {next(told)[1]["status"]}
        while "highres" not in stages:
            kind, data = next(told)
            assert (kind, data["id"]) == ("video", video["id"])
            stages.add(data["stage"])
        httpx.delete(f"{served.url}/v1/videos/{video['id']}", timeout=PATIENCE)
        while (last := next(told))[0] == "video":
            pass
        assert last == ("deleted", {"id": video["id"]})


def test_streams_end_when_the_server_does(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served, served.http.stream("GET", "/v1/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": connected"
        served.process.terminate()
        assert not any(line.startswith("data") for line in lines)
        assert served.process.wait(PATIENCE) == 143


def test_a_page_may_ask_for_events_where_there_are_none(shared: Served) -> None:
    with shared.http.stream("GET", "/v1/events?pings=true") as answer:
        assert next(events(answer)) == ("ping", {})


def test_clients_that_go_away_or_never_read_harm_nobody(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        address = urlsplit(served.url)
        request = f"GET /v1/events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
        sockets = []
        for i in range(20):
            client = socket.create_connection((address.hostname or "", address.port or 0))
            client.sendall(request)
            if i % 2:
                client.close()
            sockets.append(client)
        videos = [served.create(seed=i) for i in range(5)]
        assert all(served.until_ended(v["id"])["status"] == "completed" for v in videos)
        for client in sockets:
            client.close()
        served.create()
        while "pw_event_streams 0.0" not in served.http.get("/metrics").text:
            served.until_ended(served.create()["id"])
        assert served.end() == 143


def test_streams_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path / "root", limits={"listeners": 1}) as served:
        path = f"{served.url}/v1/events"
        with served.http.stream("GET", path) as first:
            lines = first.iter_lines()
            assert next(lines) == ": connected"
            refused = httpx.get(path, timeout=PATIENCE)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "10"
