# SPDX-License-Identifier: Apache-2.0
"""The API: its routes, each a few lines between a request and the supervisor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from pw_runtime.errors import WriteFailed
from pw_runtime.server import api_error, files
from pw_runtime.server.api_error import ApiError, ErrorBody, not_found
from pw_runtime.server.create_video import CreateVideo, fingerprint_of, read_body
from pw_runtime.server.file_response import RangedFile
from pw_runtime.server.guard import COOKIE, client_of, session_of
from pw_runtime.server.metrics import CONTENT_TYPE
from pw_runtime.server.offer import Offer, require_id
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Job, KeyReused, QueueFull, Store
from pw_runtime.server.supervisor import Supervisor
from pw_runtime.server.video import Deleted, Video, VideoList

PAGE: Final = Path(__file__).parent / "page"
CANCEL_SECONDS: Final = 30.0  # that a request waits for a running job to end
SESSION_SECONDS: Final = 30 * 86_400
POLL: Final = {"openai-poll-after-ms": "1000"}  # the official client reads it
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 429, 503)
}
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Token(BaseModel):
    """The body of POST /v1/session."""

    token: str


def make_app(
    settings: Settings, store: Store, supervisor: Supervisor, lifespan: Lifespan
) -> FastAPI:
    """Return the application; `lifespan` starts and stops what is behind it."""
    app = FastAPI(
        title="PixelWizard Runtime",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    api_error.install(app)
    _add_videos(app, settings, store, supervisor)
    _add_files(app, settings, store)
    _add_events(app, store, supervisor)
    _add_about(app, settings, supervisor)
    _add_session(app, settings)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        # uvicorn prints the traceback
        return ApiError(
            500, "internal", f"an error of the server: {type(error).__name__}"
        ).response()

    _add_head(app)
    if PAGE.is_dir():
        app.mount("/", _PageFiles(directory=PAGE, html=True), name="page")
    return app


def _add_head(app: FastAPI) -> None:
    """Answer HEAD wherever GET is, for players that ask first; streams have no end to tell."""
    for route in [x for x in app.routes if isinstance(x, APIRoute)]:
        if "GET" in (route.methods or ()) and route.response_class is not StreamingResponse:
            app.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                response_class=route.response_class,
                include_in_schema=False,
            )


class _PageFiles(StaticFiles):
    """The page's files. A browser asks each time whether they are still the same: after an upgrade
    it would else mix old and new ones.
    """

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Return a file's answer, or that it is unchanged."""
        response = super().file_response(*args, **options)
        response.headers["cache-control"] = "no-cache"
        return response


def _job(store: Store, video_id: str) -> Job:
    """Return the job of an id. Raises ApiError."""
    job = store.get(require_id(video_id, "video_id"))
    if job is None:
        raise not_found(video_id)
    return job


def _draft(store: Store, body: CreateVideo) -> Job | None:
    """Return the job whose draft a request finishes, if it names one. Raises ApiError."""
    if body.draft_id is None:
        return None
    draft = store.get(require_id(body.draft_id, "draft_id"))
    if draft is None:
        message = f"there is no video {body.draft_id}"
        raise ApiError(400, "not_found", message, param="draft_id")
    return draft


def _described(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's schema, complete in itself: OpenAPI has no place for its definitions."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, part in parts.items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(part))
    described: dict[str, Any] = json.loads(text)
    return described


def _answer(video: BaseModel, headers: dict[str, str] | None = None) -> Response:
    return Response(video.model_dump_json(), media_type="application/json", headers=headers)


def _add_videos(app: FastAPI, settings: Settings, store: Store, supervisor: Supervisor) -> None:
    schema = _described(CreateVideo)
    form = {name: {"schema": schema} for name in ("application/json", "multipart/form-data")}

    @app.post(
        "/v1/videos",
        response_model=Video,
        openapi_extra={"requestBody": {"required": True, "content": form}},
    )
    async def create_video(
        request: Request, idempotency_key: Annotated[str | None, Header()] = None
    ) -> Response:
        """Queue a video, or `n` of them."""
        body, picture = await read_body(request, settings.limits)
        client = request.scope["client_name"]
        try:  # what was accepted once stays so, whatever has changed since then
            added = store.repeated(client, idempotency_key, fingerprint_of(body, picture))
            if not added:
                draft = _draft(store, body)
                if draft is not None:
                    picture = files.picture_of(settings.root, draft)
                offer = Offer(settings=settings, fits=supervisor.fits)
                jobs = offer.jobs(body, client, idempotency_key, draft, picture)
                added = await supervisor.submit(jobs, picture)
        except QueueFull as error:
            message = f"the queue is full: {error.limit} jobs {error.whose} wait; try again later"
            headers = {"retry-after": "30"}
            raise ApiError(429, "queue_full", message, headers=headers) from error
        except WriteFailed as error:
            raise ApiError(503, "storage_unavailable", str(error)) from error
        except KeyReused as error:
            message = "this Idempotency-Key was used with another request"
            raise ApiError(409, "idempotency_key_reused", message) from error
        return _answer(supervisor.video(added[0]), POLL)

    @app.get("/v1/videos", response_model=VideoList)
    async def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """List videos, the newest first."""
        seq = None
        if after is not None and (seq := store.place(after)) is None:
            raise not_found(after, "after")
        jobs = store.page(after=seq, limit=limit + 1, newest_first=order == "desc")
        positions = store.positions()
        data = [supervisor.video(job, positions.get(job.id)) for job in jobs[:limit]]
        page = VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(jobs) > limit,
        )
        return _answer(page)

    @app.get("/v1/videos/{video_id}", response_model=Video)
    async def get_video(video_id: str) -> Response:
        """Describe a video."""
        return _answer(supervisor.video(_job(store, video_id)), POLL)

    @app.post("/v1/videos/{video_id}/cancel", response_model=Video)
    async def cancel_video(video_id: str) -> Response:
        """End a video's job; its record, and its draft if it is there, stay."""
        job = _job(store, video_id)
        if job.status == "completed":
            raise ApiError(409, "already_completed", f"{job.id} is completed")
        message = "cancelled by request"
        await supervisor.end_early(job.id, "cancelled", message, CANCEL_SECONDS)
        return _answer(supervisor.video(_job(store, video_id)))

    @app.delete("/v1/videos/{video_id}", response_model=Deleted)
    async def delete_video(video_id: str) -> Response:
        """End a video's job if it runs, and remove its files and its record."""
        job = _job(store, video_id)
        if not await supervisor.remove(job.id, CANCEL_SECONDS):
            raise not_found(video_id)
        return _answer(Deleted(id=job.id))


def _add_files(app: FastAPI, settings: Settings, store: Store) -> None:
    kinds: dict[str, dict[str, Any]] = {"video/mp4": {}, "image/jpeg": {}}

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=RangedFile,
        responses={200: {"content": kinds}, 206: {"content": kinds}, 416: {"model": ErrorBody}},
    )
    async def get_content(
        video_id: str, variant: Literal["video", "draft", "thumbnail"] = "video"
    ) -> Response:
        """Return the mp4, the preview of the draft, or a picture; ranges are served."""
        job = _job(store, video_id)
        there = job.status == "completed" if variant == "video" else job.draft_ready
        path = files.content(settings.root, job, variant)
        if not there or not path.is_file():
            raise _not_there(job, variant)
        kind, name = ("image/jpeg", "jpg") if variant == "thumbnail" else ("video/mp4", "mp4")
        headers = {"cache-control": "private, no-cache"}
        filename = f"{job.id}-{variant}.{name}"
        return RangedFile(
            path,
            media_type=kind,
            filename=filename,
            content_disposition_type="inline",
            headers=headers,
        )

    @app.get(
        "/v1/videos/{video_id}/receipt",
        response_model=dict[str, Any],
        responses={416: {"model": ErrorBody}},
    )
    async def get_receipt(video_id: str) -> Response:
        """Return what made a video, with what, in which time and memory."""
        job = _job(store, video_id)
        path = files.receipt(settings.root, job)
        if job.status != "completed" or not path.is_file():
            raise _not_there(job, "receipt")
        return RangedFile(path, media_type="application/json")


def _not_there(job: Job, what: str) -> ApiError:
    """Return the error that a file of a job cannot be had, and why."""
    if job.status == "failed":
        message = f"{job.id} has no {what}: it failed ({job.error_message})"
        return ApiError(409, "failed", message)
    if job.status == "completed":
        return ApiError(404, "file_gone", f"the {what} of {job.id} is no longer on the disk")
    return ApiError(
        409, "not_ready", f"the {what} of {job.id} is not there yet: it is {job.status}"
    )


def _add_events(app: FastAPI, store: Store, supervisor: Supervisor) -> None:
    schema: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    def streaming(only: str | None, *, pings: bool = False) -> StreamingResponse:
        if supervisor.hub.is_full:
            message = "there are too many event streams; poll instead"
            raise ApiError(429, "too_many_streams", message, headers={"retry-after": "10"})
        stream: AsyncIterator[bytes] = supervisor.hub.stream(only, pings=pings)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @app.get("/v1/events", response_class=StreamingResponse, responses=schema)
    async def get_events(pings: bool = False) -> Response:
        """Stream every change of every video; with pings, an event also where there is none."""
        return streaming(None, pings=pings)

    @app.get("/v1/videos/{video_id}/events", response_class=StreamingResponse, responses=schema)
    async def get_video_events(video_id: str) -> Response:
        """Stream every change of a video, until it has ended."""
        return streaming(_job(store, video_id).id)


def _add_about(app: FastAPI, settings: Settings, supervisor: Supervisor) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the one model."""
        model = {"id": settings.model_name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [model]}

    @app.get("/v1/presets")
    async def list_presets() -> dict[str, Any]:
        """List the presets on offer, the default first; `fits` is null until it is known."""
        fits = supervisor.fits
        data = []
        for name, preset in settings.presets.items():
            last, fit = preset.highres or preset.draft, fits.get(name)
            data.append(
                {
                    "id": name,
                    "object": "preset",
                    "size": f"{last.width}x{last.height}",
                    "draft_size": f"{preset.draft.width}x{preset.draft.height}",
                    "frames": preset.video.frames,
                    "fps": preset.video.fps,
                    "steps": {"draft": preset.draft.steps}
                    | ({"highres": preset.highres.steps} if preset.highres else {}),
                    "has_highres": preset.highres is not None,
                    "fits": None if fit is None else fit.fits,
                    "draft_fits": None if fit is None else fit.draft_fits,
                    "reason": None if fit is None or fit.fits else fit.reason,
                    "estimated_seconds": None if fit is None else dict(fit.seconds),
                }
            )
        return {"object": "list", "data": data}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer: this process works."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Answer whether a job would be made now."""
        if (trouble := supervisor.trouble) is not None:
            raise ApiError(503, "not_ready", trouble)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the figures for Prometheus."""
        text = await asyncio.to_thread(supervisor.metrics.text)
        return Response(text, media_type=CONTENT_TYPE)


def _add_session(app: FastAPI, settings: Settings) -> None:
    @app.post("/v1/session")
    async def open_session(body: Token, request: Request) -> JSONResponse:
        """Trade a token for a cookie that scripts cannot read."""
        answer = JSONResponse({"object": "session"})
        if not settings.tokens:
            return answer
        if client_of(body.token, settings.tokens) is None:
            raise ApiError(401, "invalid_token", "this token is not known here", param="token")
        answer.set_cookie(
            COOKIE,
            session_of(body.token),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer
