# SPDX-License-Identifier: Apache-2.0
"""The body of POST /v1/videos: its fields, read from JSON or a form."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from pw_runtime.errors import BadRequest
from pw_runtime.server.api_error import ApiError, invalid
from pw_runtime.server.settings import Limits

REFERENCE: Final = "input_reference"
_DECODING: Final = asyncio.Lock()  # one picture at a time: one of 100 megapixels takes 1.4 GB

_REFUSED: Final[Mapping[str, str]] = {
    "num_inference_steps": "the steps are the preset's: choose another preset",
    "guidance_scale": "the guidance is the preset's: choose another preset",
    "width": "give size, 2560x1440 for instance",
    "height": "give size, 2560x1440 for instance",
    "num_frames": "give seconds, and fps if it is not to be the preset's",
}


class InputReference(BaseModel):
    """A picture in a JSON body; a form has it as the file `input_reference`."""

    model_config = ConfigDict(extra="forbid")

    image_url: str = Field(description="data:image/png;base64,... Nothing is fetched.")


class CreateVideo(BaseModel):
    """The body of POST /v1/videos, as JSON or as a form."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, description="Required, unless draft_id names a draft.")
    model: str | None = Field(None, description="The id that GET /v1/models lists.")
    negative_prompt: str | None = Field(None, description="Default: the official one.")
    size: str | None = Field(None, description="Of a preset on offer, 2560x1440 for instance.")
    seconds: str | float | None = Field(None, description="At most the preset's.")
    fps: int | None = Field(None, description="Frames per second at which the clip is played.")
    seed: int | None = Field(None, description="-1, the default: a random one.")
    n: int = Field(1, description="Clips of the seeds seed, seed + 1, ...; drafts, for instance.")
    preset: str | None = Field(None, description="A name that GET /v1/presets lists.")
    draft_only: bool = Field(False, description="Stop at the draft, which can be finished later.")
    draft_id: str | None = Field(None, description="Finish the draft of this video.")
    priority: int = Field(0, description="Higher ones run earlier.")
    input_reference: InputReference | None = Field(
        None, description="A picture that is the first frame, as the official client sends it."
    )


async def read_body(request: Request, limits: Limits) -> tuple[CreateVideo, bytes | None]:
    """Return the body of a request, and the picture in it. Raises ApiError."""
    content, picture = await _content(request)
    body = parse_body(content)
    if picture is None and body.input_reference is not None:
        picture = _decoded(body.input_reference.image_url)
    if picture is None:
        size = len(json.dumps(content))
        if size > limits.body_bytes:
            message = f"the body has more than {limits.body_bytes} bytes"
            raise ApiError(413, "body_too_large", message)
        return body, None
    if body.draft_id is not None:
        message = "input_reference and draft_id exclude each other: a draft has its own first frame"
        raise ApiError(400, "contradiction", message, param=REFERENCE)
    if len(picture) > limits.picture_bytes:
        message = (
            f"the picture has {len(picture)} bytes, and at most {limits.picture_bytes} are taken"
        )
        raise ApiError(413, "body_too_large", message, param=REFERENCE)
    # why here: the server starts without numpy, which decoding needs
    from pw_runtime.system.picture_input import decode_picture

    try:
        async with _DECODING:
            await asyncio.to_thread(decode_picture, picture, REFERENCE)
    except BadRequest as error:
        raise ApiError(400, "invalid_picture", str(error), param=REFERENCE) from error
    return body, picture


def parse_body(content: object) -> CreateVideo:
    """Return a request. Raises ApiError that names every field in the wrong."""
    if not isinstance(content, dict):
        raise ApiError(400, "invalid_body", "the body is not an object of fields")
    unknown = [name for name in content if name not in CreateVideo.model_fields]
    if unknown:
        name = str(unknown[0])
        known = ", ".join(CreateVideo.model_fields)
        why = _REFUSED.get(name, f"the fields are {known}")
        message = f"{name[:80]!a} is not accepted: {why}"
        raise ApiError(400, "unknown_field", message, param=name[:80])
    given = {name: value for name, value in content.items() if value is not None}
    if not isinstance(given.get(REFERENCE, {}), dict):
        message = (
            f"{REFERENCE} is a file of a form, or in JSON "
            '{"image_url": "data:image/png;base64,..."}'
        )
        raise ApiError(400, "invalid_value", message, param=REFERENCE)
    try:
        return CreateVideo.model_validate(given)
    except ValidationError as error:
        raise invalid(error) from error


def fingerprint_of(body: CreateVideo, picture: bytes | None = None) -> str:
    """Return what tells requests with one Idempotency-Key apart."""
    content = json.dumps(body.model_dump(exclude={REFERENCE}), sort_keys=True)
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    digest.update(picture or b"")
    return digest.hexdigest()


def _decoded(url: str) -> bytes:
    """Return the content of a data: URL. Raises ApiError."""
    head, comma, content = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        message = (
            f"image_url is {url[:40]!a}, wanted data:image/png;base64,...: this server fetches "
            "nothing"
        )
        raise ApiError(400, "invalid_value", message, param=REFERENCE)
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        message = f"image_url is not base64: {error}"
        raise ApiError(400, "invalid_value", message, param=REFERENCE) from error


async def _content(request: Request) -> tuple[object, bytes | None]:
    """Return the fields of a request's body, and the picture of a form. Raises ApiError."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields, picture = {}, None
        async with request.form(max_files=1, max_fields=50) as form:
            for name, value in form.items():
                if isinstance(value, str):
                    fields[name] = value
                elif name == REFERENCE:
                    picture = await value.read()
                else:
                    message = f"{name[:80]!a} is a file: the only one that is taken is {REFERENCE}"
                    raise ApiError(400, "unknown_field", message, param=name[:80])
        return fields, picture
    if kind != "application/json":
        message = f"the body is {kind[:80]!a}, wanted application/json or multipart/form-data"
        raise ApiError(400, "unsupported_media_type", message)
    try:
        return await request.json(), None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from error
