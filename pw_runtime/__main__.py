# SPDX-License-Identifier: Apache-2.0
"""`python -m pw_runtime` is `pw`."""

from pw_runtime.cli.main import main

main()
