# SPDX-License-Identifier: Apache-2.0
"""A plain second reading of the official recipe; the product is tested against it."""
