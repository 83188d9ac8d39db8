# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of the built-in model.

python -m pw_export.nano --out DIR [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pw_export.nano.random_weights import write_nano_checkpoint


def main() -> None:
    """Run `python -m pw_export.nano`."""
    parser = argparse.ArgumentParser(description="Write the small demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_nano_checkpoint(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
