# SPDX-License-Identifier: Apache-2.0
"""The VAE's kernels, compiled for every generation of GPU that we compile for."""

from __future__ import annotations

import pytest

from pw_kernels.ahead_of_time import SHARED_LIMITS
from tests.kernels.compiling import assert_resources, reports_of


@pytest.mark.slow
def test_vae_kernels_compile_for_every_architecture(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    reports = reports_of(tmp_path_factory, "compile_vae")
    assert {report["arch"] for report in reports} == set(SHARED_LIMITS)
    for report in reports:
        assert_resources(report)
        assert report["wide_stores"] > 0, report  # 8 or 16 bytes at a time
        narrow = report["offsets"].count("i32")
        if not report["name"].startswith("pack"):  # there: offsets within one row
            is_norm = report["name"].startswith("channel_norm")
            assert narrow == (1 if is_norm else 0), report  # gamma's, below 1024
