# SPDX-License-Identifier: Apache-2.0
"""The machine under the runtime: files, memory, the clock, the terminal, threads."""
