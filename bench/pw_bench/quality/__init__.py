# SPDX-License-Identifier: Apache-2.0
"""What the built-in model's clips show, by plain measurement (docs/quality.md)."""
