# SPDX-License-Identifier: Apache-2.0
"""The place of compiled engines, behind one protocol.

Nothing is compiled in this version: every network runs as a PyTorch module.
"""
