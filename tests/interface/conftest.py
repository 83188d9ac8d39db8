# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.e2e.pw import Pw


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)
