# SPDX-License-Identifier: Apache-2.0
"""One clip by several processes together, or on several GPUs, beside one."""
