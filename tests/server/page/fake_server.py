# SPDX-License-Identifier: Apache-2.0
"""The API of `pw serve`, as far as its page uses it, with jobs that move when a test says so."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from fastapi.staticfiles import StaticFiles
from PIL import Image

PAGE = Path(__file__).parents[3] / "pw_runtime" / "server" / "page"
POLICY = "default-src 'self'"
Video = dict[str, Any]


def preset(name: str, size: str, steps: int, reason: str | None = None) -> dict[str, Any]:
    """Return a preset of 121 frames; `reason`: why it does not fit."""
    return {
        "id": name,
        "object": "preset",
        "size": size,
        "draft_size": "448x256",
        "frames": 121,
        "fps": 24,
        "steps": {"draft": 50, "highres": steps},
        "has_highres": True,
        "fits": reason is None,
        "draft_fits": True,
        "reason": reason,
        "estimated_seconds": {},
    }


TOO_LARGE = "31.2 GiB of GPU memory are needed, and 24 GiB are there"
PRESETS = [
    preset("2k", "2560x1440", 4),
    preset("4k", "3840x2144", 4),
    preset("4k-5step", "3840x2144", 5, reason=TOO_LARGE),
]


@cache
def clip(width: int = 112, height: int = 64, frames: int = 24, fps: int = 12) -> bytes:
    """Return an mp4 that every Chromium plays (VP9): a disc that drifts over a gradient."""
    rows, columns = np.mgrid[:height, :width]
    down, right = 80 * rows // height, 60 * columns // width
    ground = np.stack([40 + down, 70 + down, 90 + right], axis=-1)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libvpx-vp9", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            x = width * (index + 4) // (frames + 8)
            disc = (columns - x) ** 2 + (rows - height * 0.6) ** 2 < (height / 5) ** 2
            image = np.where(disc[..., None], (206, 74, 52), ground).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def thumbnail() -> bytes:
    """Return a JPEG file."""
    file = io.BytesIO()
    Image.new("RGB", (112, 64), (96, 120, 140)).save(file, "jpeg")
    return file.getvalue()


def listen(port: int) -> socket.socket:
    """Return a socket at which connections queue from now on."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("127.0.0.1", port))
    opened.listen(100)
    return opened


class FakeServer:
    """A server on a port of its own; `make` and `change` stand for its queue and its worker."""

    def __init__(self, token: str | None = None, presets: list[dict[str, Any]] = PRESETS) -> None:
        self.videos: dict[str, Video] = {}  # oldest first
        self.posts: list[tuple[dict[str, Any], str | None]] = []  # bodies and their keys
        self.token = token
        self.presets = presets
        self.events = True
        self.held_back = False  # streams open, and nothing comes
        self.trouble: str | None = None
        self.refusal: tuple[int, dict[str, Any]] | None = None  # of the next submission
        self.files = {"video": clip(224, 128), "draft": clip(), "thumbnail": thumbnail()}
        self.versions: dict[str, int] = {}
        self.deleted: list[str] = []
        self.listeners = 0
        self._listening = threading.Condition()
        self._stopping = False
        self._socket = listen(0)
        self._port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/"

    # ---- the process

    def start(self) -> None:
        """Answer requests; those that come before it is ready wait."""
        self._stopping = False
        if self._socket.fileno() == -1:  # closed by `stop`
            self._socket = listen(self._port)
        config = uvicorn.Config(self._app(), log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        run = {"target": self._server.run, "args": ([self._socket],), "daemon": True}
        self._thread = threading.Thread(**run)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more; the jobs stay."""
        self._stopping = True
        self._server.should_exit = True
        self._thread.join(10)

    def until_listeners(self, count: int) -> None:
        """Wait until so many event streams are open."""
        with self._listening:
            there = self._listening.wait_for(lambda: self.listeners == count, timeout=10)
        assert there, f"{self.listeners} event streams, not {count}"

    # ---- the jobs

    def make(self, prompt: str = "A red ball drifts over grass.", **fields: Any) -> Video:
        """Add a job; it waits until a test moves it."""
        preset_name = fields.get("preset") or self.presets[0]["id"]
        chosen = next(p for p in self.presets if p["id"] == preset_name)
        waiting = [v for v in self.videos.values() if v["status"] == "queued"]
        video: Video = {
            "id": f"video_{uuid.uuid4().hex}",
            "object": "video",
            "model": "nano",
            "status": "queued",
            "progress": 0,
            "created_at": int(time.time()),
            "completed_at": None,
            "expires_at": None,
            "prompt": prompt,
            "negative_prompt": "",
            "seconds": f"{(chosen['frames'] - 1) / chosen['fps']:.4g}",
            "size": chosen["draft_size" if fields.get("draft_only") else "size"],
            "remixed_from_video_id": None,
            "error": None,
            "stage": None,
            "step": None,
            "steps": None,
            "seconds_left": None,
            "preset": preset_name,
            "seed": 7,
            "fps": chosen["fps"],
            "frames": chosen["frames"],
            "draft_only": False,
            "draft_id": None,
            "draft_ready": False,
            "queue_position": len(waiting),
            "client": "127.0.0.1",
            "priority": 0,
            "siblings": [],
            **fields,
        }
        self.videos[video["id"]] = video
        self._changed(video["id"])
        return video

    def change(self, video: Video, **fields: Any) -> None:
        """Move a job."""
        self.videos[video["id"]].update(fields)
        self._changed(video["id"])

    def advance(self, video: Video, stage: str, step: int, steps: int, progress: int) -> None:
        """Let a job be in a stage."""
        self.change(
            video, status="in_progress", queue_position=None, stage=stage, step=step, steps=steps,
            progress=progress, seconds_left=2.0 * (100 - progress),
        )  # fmt: skip

    def finish(self, video: Video) -> None:
        """Let a job end with its clip."""
        self.change(
            video, status="completed", progress=100, stage=None, step=None, steps=None,
            seconds_left=None, draft_ready=True, completed_at=int(time.time()),
        )  # fmt: skip

    def fail(self, video: Video, code: str, message: str) -> None:
        """Let a job end without one."""
        self.change(
            video, status="failed", stage=None, seconds_left=None,
            error={"code": code, "message": message}, completed_at=int(time.time()),
        )  # fmt: skip

    def _changed(self, video_id: str) -> None:
        self.versions[video_id] = self.versions.get(video_id, 0) + 1

    def _submit(self, body: dict[str, Any]) -> Video:
        fields = {name: body[name] for name in ("preset", "negative_prompt") if name in body}
        fields |= {"draft_only": body.get("draft_only", False)}
        seed = body.get("seed", -1)
        first_seed = 1000 if seed == -1 else seed
        if "draft_id" in body:
            draft = self.videos[body["draft_id"]]
            fields |= {"draft_id": draft["id"], "draft_ready": True}
            return self.make(draft["prompt"], seed=draft["seed"], **fields)
        made = [
            self.make(body["prompt"], seed=first_seed + number, **fields)
            for number in range(body.get("n", 1))
        ]
        ids = [video["id"] for video in made]
        for video in made if len(made) > 1 else []:
            self.change(video, siblings=[other for other in ids if other != video["id"]])
        return made[0]

    # ---- the routes

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Response:
            opens = request.url.path == "/v1/session"
            known = request.cookies.get("session") == self.token
            if self.token and request.url.path.startswith("/v1/") and not opens and not known:
                return refusal(401, "A token is needed.", "invalid_token")
            response: Response = await call_next(request)
            response.headers["Content-Security-Policy"] = POLICY
            return response

        @app.exception_handler(HTTPException)
        async def refused(request: Request, error: HTTPException) -> JSONResponse:
            return refusal(error.status_code, str(error.detail), None)

        @app.get("/ready")
        async def ready() -> dict[str, str]:
            if self.trouble:
                raise HTTPException(503, self.trouble)
            return {"status": "ready"}

        @app.post("/v1/session")
        async def session(body: dict[str, Any]) -> Response:
            if body["token"] != self.token:
                return refusal(401, "This is not the token.", "invalid_token")
            answer = JSONResponse({"object": "session"})
            answer.set_cookie("session", body["token"], httponly=True, samesite="strict")
            return answer

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "nano", "object": "model"}]}

        @app.get("/v1/presets")
        async def presets() -> dict[str, Any]:
            return {"object": "list", "data": self.presets}

        @app.post("/v1/videos")
        async def create(request: Request) -> Response:
            body = await request.json()
            self.posts.append((body, request.headers.get("idempotency-key")))
            if self.refusal is not None:
                (status, error), self.refusal = self.refusal, None
                return JSONResponse({"error": error}, status)
            return JSONResponse(self._submit(body))

        @app.get("/v1/videos")
        async def listing(limit: int = 20, after: str | None = None) -> dict[str, Any]:
            ids = list(reversed(self.videos))
            start = ids.index(after) + 1 if after else 0
            page = ids[start : start + limit]
            return {
                "object": "list",
                "data": [self.videos[i] for i in page],
                "first_id": page[0] if page else None,
                "last_id": page[-1] if page else None,
                "has_more": start + limit < len(ids),
            }

        @app.post("/v1/videos/{video_id}/cancel")
        async def cancel(video_id: str) -> Video:
            self.fail(self._known(video_id), "cancelled", "cancelled by request")
            return self.videos[video_id]

        @app.delete("/v1/videos/{video_id}")
        async def delete(video_id: str) -> dict[str, Any]:
            self._known(video_id)
            del self.videos[video_id]
            self.deleted.append(video_id)
            return {"id": video_id, "object": "video.deleted", "deleted": True}

        @app.get("/v1/videos/{video_id}/receipt")
        async def receipt(video_id: str) -> Response:
            made = {"prompt": self._known(video_id)["prompt"], "version": "<b>0.1</b>"}
            content = json.dumps(made | {"seed": 2**60 + 1}, indent=2)
            return Response(content, media_type="application/json")

        @app.get("/v1/videos/{video_id}/content")
        async def content(request: Request, video_id: str, variant: str = "video") -> Response:
            video = self._known(video_id)
            ready = video["status"] == "completed" if variant == "video" else video["draft_ready"]
            if not ready:
                raise HTTPException(409, "not there yet")
            kind = "image/jpeg" if variant == "thumbnail" else "video/mp4"
            return ranged(self.files[variant], request.headers.get("range"), kind)

        @app.get("/v1/events")
        async def events() -> Response:
            if not self.events:
                raise HTTPException(503, "no events")
            return StreamingResponse(self._stream(), media_type="text/event-stream")

        app.mount("/", StaticFiles(directory=PAGE, html=True))
        return app

    async def _stream(self) -> AsyncIterator[bytes]:
        self._count(1)
        try:
            async for event in self._events():
                yield event
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._listening:
            self.listeners += change
            self._listening.notify_all()

    async def _events(self) -> AsyncIterator[bytes]:
        told, gone = dict(self.versions), len(self.deleted)
        if not self.held_back:
            yield format_sse_event(event="ping", data_str="{}")
        while not self._stopping:
            for video_id, version in list(self.versions.items()) * (not self.held_back):
                if told.get(video_id) != version and video_id in self.videos:
                    told[video_id] = version
                    yield format_sse_event(
                        event="video", data_str=json.dumps(self.videos[video_id])
                    )
            for video_id in self.deleted[gone:]:
                gone += 1
                yield format_sse_event(event="deleted", data_str=json.dumps({"id": video_id}))
            await asyncio.sleep(0.02)

    def _known(self, video_id: str) -> Video:
        if video_id not in self.videos:
            raise HTTPException(404, f"no job {video_id}")
        return self.videos[video_id]


def refusal(status: int, message: str, code: str | None) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    error = {"message": message, "type": "invalid_request_error", "code": code, "param": None}
    return JSONResponse({"error": error}, status)


def ranged(content: bytes, asked: str | None, kind: str) -> Response:
    """Return a file, or the part of it that was asked for: `bytes=0-`."""
    if asked is None:
        return Response(content, media_type=kind, headers={"Accept-Ranges": "bytes"})
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(content)), len(content) - 1)
    headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}", "Accept-Ranges": "bytes"}
    return Response(content[start : end + 1], 206, headers, kind)
