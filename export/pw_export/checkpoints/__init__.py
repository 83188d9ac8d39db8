# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints as they are found: files, names, configs, values."""
