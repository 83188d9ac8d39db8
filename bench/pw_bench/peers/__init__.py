# SPDX-License-Identifier: Apache-2.0
"""Ours beside other implementations, and the memory of whole programs."""
