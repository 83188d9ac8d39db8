# SPDX-License-Identifier: Apache-2.0
"""Pictures that clips start from: how they are sent, checked, kept and removed."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image
from starlette.requests import Request

from pw_runtime.errors import WriteFailed
from pw_runtime.server import create_video, files
from pw_runtime.server.create_video import read_body
from pw_runtime.server.settings import Limits
from pw_runtime.server.store import Store
from tests.server.servers import Served, serving
from tests.server.test_limits import new_job

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def test_a_full_disk_is_told_where_the_folder_of_a_job_is_made_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "jobs").mkdir()
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(WriteFailed, match="No space left"):
        files.keep_picture(tmp_path, [new_job(1).id], png())


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> dict[str, str]:
    return {"image_url": "data:image/png;base64," + base64.b64encode(content).decode()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures") / "root"


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving(root, limits={"picture_bytes": 2**20}) as made:
        yield made


def folder(root: Path, video: dict[str, Any]) -> Path:
    return root / "jobs" / str(video["id"])


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
def test_a_picture_is_kept_with_its_job_and_removed_with_it(
    served: Served, root: Path, form: bool
) -> None:
    content = png()
    if form:
        answer = served.http.post(
            "/v1/videos",
            data={"prompt": "a fox", "n": "2"},
            files={"input_reference": ("start.png", content, "image/png")},
        )
        assert answer.status_code == 200, answer.text
        video = answer.json()
    else:
        video = served.create(input_reference=data_url(content), n=2)
    assert video["picture"] == hashlib.sha256(content).hexdigest()
    for job_id in (video["id"], *video["siblings"]):
        assert served.until_ended(job_id)["status"] == "completed"
        assert (root / "jobs" / job_id / "picture").read_bytes() == content
        served.http.delete(f"/v1/videos/{job_id}")
        assert not (root / "jobs" / job_id).exists()
    assert served.create()["picture"] is None


def test_the_official_client_sends_a_picture(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    video = client.videos.create_and_poll(
        prompt="a fox", input_reference=("start.png", png(), "image/png")
    )
    assert video.status == "completed"


def test_a_finished_draft_takes_its_picture_along(served: Served, root: Path) -> None:
    draft = served.create(input_reference=data_url(png("blue")), draft_only=True)
    served.until_ended(draft["id"])
    answer = served.http.post("/v1/videos", json={"draft_id": draft["id"]})
    assert answer.status_code == 200, answer.text
    finished = answer.json()
    assert finished["picture"] == draft["picture"]
    served.http.delete(f"/v1/videos/{draft['id']}")
    assert (folder(root, finished) / "picture").read_bytes() == png("blue")


@pytest.mark.parametrize(
    ("reference", "code", "told"),
    [
        ({"image_url": "https://example.org/a.png"}, "invalid_value", "fetches nothing"),
        ({"image_url": "data:image/png,abc"}, "invalid_value", "data:image/png;base64"),
        ({"image_url": "data:image/png;base64,a!b"}, "invalid_value", "not base64"),
        (data_url(b"no picture"), "invalid_picture", "no picture of a known format"),
        (data_url(b""), "invalid_picture", "an empty file"),
        (data_url(png()[:60]), "invalid_picture", "damaged"),
        ({"file_id": "file-1"}, "invalid_value", "image_url"),
    ],
)
def test_what_is_no_picture_is_refused(
    served: Served, root: Path, reference: dict[str, str], code: str, told: str
) -> None:
    before = set((root / "jobs").glob("*"))
    body = {"prompt": "a fox", "input_reference": reference}
    status, error = served.error("POST", "/v1/videos", json=body)
    assert status == 400
    assert error["code"] == code
    assert error["param"] in ("input_reference", "image_url")
    assert told in error["message"]
    assert set((root / "jobs").glob("*")) == before


def test_sizes_have_limits(served: Served) -> None:
    large = {"prompt": "a fox", "input_reference": data_url(png() + b"x" * 2**20)}
    status, error = served.error("POST", "/v1/videos", json=large)
    assert (status, error["code"]) == (413, "body_too_large")
    status, error = served.error("POST", "/v1/videos", json={"prompt": "a" * 2**19})
    assert (status, error["code"]) == (413, "body_too_large")


def test_one_picture_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of many requests at once would take all memory: 1.4 GB each."""
    now, most = 0, 0

    async def decode(*arguments: object) -> None:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        for _ in range(9):  # others may go on meanwhile
            await asyncio.sleep(0)
        now -= 1

    async def receive() -> dict[str, Any]:
        body = {"prompt": "a fox", "input_reference": data_url(png())}
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def read_three() -> None:
        scope = {"type": "http", "method": "POST", "headers": []}
        await asyncio.gather(*(read_body(Request(scope, receive), Limits()) for _ in range(3)))

    monkeypatch.setattr(asyncio, "to_thread", decode)
    monkeypatch.setattr(create_video, "_DECODING", asyncio.Lock())  # of another loop
    asyncio.run(read_three())
    assert most == 1


def test_a_draft_takes_no_other_picture(served: Served) -> None:
    draft = served.until_ended(served.create(draft_only=True)["id"])
    body = {"draft_id": draft["id"], "input_reference": data_url(png())}
    status, error = served.error("POST", "/v1/videos", json=body)
    assert (status, error["code"]) == (400, "contradiction")


def test_one_key_is_one_request_with_one_picture(served: Served, root: Path) -> None:
    headers, body = {"idempotency-key": "k"}, {"prompt": "a", "input_reference": data_url(png())}
    first = served.http.post("/v1/videos", json=body, headers=headers).json()
    before = set((root / "jobs").glob("*"))
    again = served.http.post("/v1/videos", json=body, headers=headers).json()
    assert again["id"] == first["id"]
    assert (folder(root, first) / "picture").exists()
    body["input_reference"] = data_url(png("blue"))
    status, error = served.error("POST", "/v1/videos", json=body, headers=headers)
    assert (status, error["code"]) == (409, "idempotency_key_reused")
    assert set((root / "jobs").glob("*")) == before


def test_a_queue_of_before_there_were_pictures_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    store = Store(path)
    store.add([new_job(1)], most=9, most_of_client=9)
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN picture")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    store = Store(path)
    job = store.get(new_job(1).id)
    assert job is not None
    assert job.picture is None
    store.close()
