# SPDX-License-Identifier: Apache-2.0
"""Check and time every kernel."""
