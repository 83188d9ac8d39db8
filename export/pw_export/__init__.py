# SPDX-License-Identifier: Apache-2.0
"""Off-line tools: published checkpoints become bundles (`convert`), the built-in model (`nano`)."""
