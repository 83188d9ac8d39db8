# SPDX-License-Identifier: Apache-2.0
"""Memory and time of each stage in closed form, the choice that fits, and the fallback."""
