# SPDX-License-Identifier: Apache-2.0
"""Single networks beside diffusers', and the memory of whole programs."""
