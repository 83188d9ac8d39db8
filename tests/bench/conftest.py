# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmark's tests: one small checkpoint with its bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.programs import write_checkpoint


@pytest.fixture(scope="session")
def official_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random checkpoint in the official layout, its bundle beside it."""
    return write_checkpoint(tmp_path_factory.mktemp("official"))
