# SPDX-License-Identifier: Apache-2.0
"""Measurements: programs with a protocol, apart from the tests. Results lie in bench/results."""
