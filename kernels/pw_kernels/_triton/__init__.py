# SPDX-License-Identifier: Apache-2.0
"""Triton bodies, one file per operation; imported only when a kernel is launched or compiled."""
