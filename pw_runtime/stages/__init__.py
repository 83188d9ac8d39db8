# SPDX-License-Identifier: Apache-2.0
"""One file per arrow of prompt -> text -> draft -> condition -> highres -> decode -> write."""
