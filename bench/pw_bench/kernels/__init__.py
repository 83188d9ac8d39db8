# SPDX-License-Identifier: Apache-2.0
"""Every kernel, checked and timed."""
