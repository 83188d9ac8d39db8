# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of the built-in model.

python -m pw_export.nano --out DIR [--seed N | --weights DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pw_export.nano.random_weights import write_nano_checkpoint
from pw_export.nano.weights import write_trained_checkpoint


def main() -> None:
    """Run `python -m pw_export.nano`."""
    parser = argparse.ArgumentParser(description="Write the small demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--seed", type=int, default=0, help="of made-up weights")
    weights.add_argument("--weights", type=Path, help="folder of trained ones")
    arguments = parser.parse_args()
    if arguments.weights is not None:
        write_trained_checkpoint(arguments.out, arguments.weights)
    else:
        write_nano_checkpoint(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
