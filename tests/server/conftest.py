# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.servers import Served, serving


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with the fake worker, for tests that leave others alone."""
    with serving(tmp_path_factory.mktemp("shared") / "root") as served:
        yield served
