# SPDX-License-Identifier: Apache-2.0
"""What `import tensorrt` finds where this folder is on the path: the simulator."""

from __future__ import annotations

import os
import sys

from tests.engines.tensorrt.simulator import VERSION, make

sys.modules[__name__] = make(os.environ[VERSION])
