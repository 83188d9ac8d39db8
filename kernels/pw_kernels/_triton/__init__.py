# SPDX-License-Identifier: Apache-2.0
"""Triton bodies, one file per operation. Imported only when a kernel is launched or compiled."""
