# SPDX-License-Identifier: Apache-2.0
"""Off-line tools: bundles, engines, ONNX models, the kernel library, the built-in model."""
