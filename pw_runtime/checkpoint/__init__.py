# SPDX-License-Identifier: Apache-2.0
"""Converted checkpoints: open, verify, load."""
