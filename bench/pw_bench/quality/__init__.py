# SPDX-License-Identifier: Apache-2.0
"""Quality of the built-in model's clips, by plain measurement (docs/quality.md)."""
