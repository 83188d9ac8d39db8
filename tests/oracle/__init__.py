# SPDX-License-Identifier: Apache-2.0
"""Tests of the second implementation of the official recipe (pw_bench.official), and their data."""
