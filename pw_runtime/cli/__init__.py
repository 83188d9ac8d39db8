# SPDX-License-Identifier: Apache-2.0
"""The command line, `pw`: on top of everything, imported by nothing."""
