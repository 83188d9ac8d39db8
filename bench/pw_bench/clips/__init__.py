# SPDX-License-Identifier: Apache-2.0
"""How far clips are apart, and how visible their seams are."""
