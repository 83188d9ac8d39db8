# SPDX-License-Identifier: Apache-2.0
"""The version of the NVIDIA driver."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

DRIVER: Final = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """Read the version of the NVIDIA driver, where the system has it."""
    try:
        match = re.search(r"\s(\d+\.\d[\d.]*)\s", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None
