# SPDX-License-Identifier: Apache-2.0
"""Prompt to video by several programs, in turns."""
