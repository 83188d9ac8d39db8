# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at random moments, and what going on costs."""
