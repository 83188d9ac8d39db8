# SPDX-License-Identifier: Apache-2.0
"""The official Python client of OpenAI works against the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.server.servers import Served, serving

# OpenAI ends its own service; the client's methods stay, and are what other servers speak to.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("openai") / "root") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none is asked for", max_retries=0) as made:
        yield made


def test_create_and_poll_then_download_and_delete(client: OpenAI, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(
        model="model",
        prompt="a fox",
        seconds="2",  # type: ignore[arg-type]  # the client's types have those of its service
        size="2560x1440",  # type: ignore[arg-type]
        extra_body={"seed": 3},
    )
    assert (video.status, video.progress, video.seconds) == ("completed", 100, "2")
    assert video.completed_at is not None
    client.videos.download_content(video.id).write_to_file(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_text().startswith("clip of 3")
    picture = client.videos.download_content(video.id, variant="thumbnail").read()
    assert picture == b"picture"
    assert client.videos.retrieve(video.id).id == video.id
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(video.id)


def test_pages_follow_each_other_to_the_end(client: OpenAI) -> None:
    made = [client.videos.create(prompt=f"a fox {i}").id for i in range(5)]
    pages = client.videos.list(limit=2, order="asc")
    assert pages.has_more
    listed = [video.id for video in pages]
    assert listed[-5:] == made
    newest = next(iter(client.videos.list(limit=1)))
    assert newest.id == made[-1]


def test_a_poll_ends_with_a_failure_and_its_reason(client: OpenAI) -> None:
    video = client.videos.create_and_poll(prompt="fail")
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, video.error.message) == ("bad_result", "out of memory")


def test_errors_become_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a fox", size="1x1")  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == ("unknown_size", "size")
    assert "the nearest is" in str(caught.value)


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["model"]


def test_a_token_is_the_clients_key(tmp_path: Path) -> None:
    with serving(tmp_path / "root", tokens={"0123456789abcdef": "anna"}) as served:
        base_url = f"{served.url}/v1"
        with OpenAI(base_url=base_url, api_key="0123456789abcdef", max_retries=0) as allowed:
            assert allowed.videos.create(prompt="a fox").status == "queued"
        with (
            OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as refused,
            pytest.raises(openai.AuthenticationError),
        ):
            refused.videos.list()
