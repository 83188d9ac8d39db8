# SPDX-License-Identifier: Apache-2.0
"""Presentation of results files: one HTML page, tables for a README, JSON lines, the terminal."""

from pw_bench.report.page import write_html
from pw_bench.report.text import json_lines, markdown

__all__ = ["json_lines", "markdown", "write_html"]
