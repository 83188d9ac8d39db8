# SPDX-License-Identifier: Apache-2.0
"""Instruments: time, memory, the machine's ceilings, and the record of the environment."""
