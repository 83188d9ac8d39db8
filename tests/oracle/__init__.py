# SPDX-License-Identifier: Apache-2.0
"""What the second reading of the official recipe (pw_bench.official) is tested with."""
