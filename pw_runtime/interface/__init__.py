# SPDX-License-Identifier: Apache-2.0
"""The Python interface that stays loaded: `Pipeline`, which `pw_runtime` offers by that name."""
