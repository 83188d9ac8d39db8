# SPDX-License-Identifier: Apache-2.0
"""What `import torch_tensorrt` finds where this folder is on the path: a fake of it."""

from __future__ import annotations

import sys

from tests.engines.tensorrt.fake_torch_tensorrt import make

sys.modules[__name__] = make("2.13.0")
