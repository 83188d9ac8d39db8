# SPDX-License-Identifier: Apache-2.0
"""One run: what it is asked for, each clip's state, and the files a clip leaves."""
