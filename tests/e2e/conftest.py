# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.pw import Pw, write_preset


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "small.toml")
