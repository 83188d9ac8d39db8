# SPDX-License-Identifier: Apache-2.0
"""The version of the path from a segment to an engine by way of ONNX: part of every such key.

The runtime, which looks for engines, knows neither the exporter nor its packages: an engine is
found also where onnx is not installed.
"""

from __future__ import annotations

from typing import Final

# Bump when the export makes another model of the same segment, or tensorrt/onnx_build.py another
# plan of the same model.
RECIPE: Final = "2"
