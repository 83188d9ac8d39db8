# SPDX-License-Identifier: Apache-2.0
"""How things are measured: time, memory, the machine's peaks, the environment."""
