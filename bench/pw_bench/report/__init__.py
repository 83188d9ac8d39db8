# SPDX-License-Identifier: Apache-2.0
"""What results files say: one HTML page, tables for a README, lines for other programs."""

from pw_bench.report.page import write_html
from pw_bench.report.text import json_lines, markdown

__all__ = ["json_lines", "markdown", "write_html"]
