# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: programs with a protocol, separate from the tests. Results are in bench/results."""
