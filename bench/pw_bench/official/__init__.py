# SPDX-License-Identifier: Apache-2.0
"""The official recipe, read a second time from its specification and run eagerly.

It shares no code with the runtime: the runtime's tests compare with it, and the benchmark's
official program is built from it.
"""
