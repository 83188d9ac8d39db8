# SPDX-License-Identifier: Apache-2.0
"""How each stage fits into memory, how long it takes, and what to do when it does not fit."""
