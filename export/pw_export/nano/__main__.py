# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of the built-in model.

python -m pw_export.nano --out DIR [--weights DIR | --seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pw_export.nano.random_weights import write_nano_checkpoint
from pw_export.nano.weights import TRAINED, write_trained_checkpoint
from pw_runtime.errors import PixelWizardError


def main() -> None:
    """Run `python -m pw_export.nano`."""
    parser = argparse.ArgumentParser(description="Write the small demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder that must not exist yet")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", type=Path, default=TRAINED, help="folder of trained weights")
    weights.add_argument("--seed", type=int, help="random weights with this seed instead")
    arguments = parser.parse_args()
    try:
        if arguments.seed is None:
            write_trained_checkpoint(arguments.out, arguments.weights)
        else:
            write_nano_checkpoint(arguments.out, arguments.seed)
    except PixelWizardError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
