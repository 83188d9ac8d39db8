# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: one thread per worker, a small official checkpoint and its bundle."""

from __future__ import annotations

import os
from pathlib import Path

# why here: Triton reads this when it is first imported, and decides for the whole process whether
# kernels are interpreted or compiled. What a test compiles, it compiles in a process of its own.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from pw_export.convert import convert
from tests.oracle.checkpoint import Checkpoint, write_official_checkpoint


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_engines_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PW_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small random checkpoint in the official layout, with a draft of its own."""
    return write_official_checkpoint(tmp_path_factory.mktemp("checkpoint"), with_draft=True)


@pytest.fixture(scope="session")
def bundle_dir(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle made of base and high-res weights of `checkpoint`."""
    out = tmp_path_factory.mktemp("bundle") / "small"
    convert(wan=checkpoint.base, highres=checkpoint.highres, out=out, say=lambda line: None)
    return out
