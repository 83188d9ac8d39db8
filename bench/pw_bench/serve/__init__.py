# SPDX-License-Identifier: Apache-2.0
"""Load on `pw serve`: clients that poll, event streams, a long queue, many jobs in a row."""
