# SPDX-License-Identifier: Apache-2.0
"""Comparison of clips: latents, frames, seams."""
