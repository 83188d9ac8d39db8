# SPDX-License-Identifier: Apache-2.0
"""Many clips on many machines: one driver, workers in Ray actors, every clip published once."""
