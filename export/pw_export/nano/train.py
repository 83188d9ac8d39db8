# SPDX-License-Identifier: Apache-2.0
"""Train the whole built-in model, or go on with it, and keep its weights.

python -m pw_export.nano.train --work DIR

Each network trains until its recipe's steps are done; what is done already is not done again. The
weights end up in DIR/weights.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pw_export.nano import train_draft, train_highres, train_vae
from pw_export.nano.weights import keep_weights


def main() -> None:
    """Run `python -m pw_export.nano.train`."""
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of data, states and logs")
    recipes = {
        "draft": train_draft.RECIPE,
        "highres": train_highres.RECIPE,
        "decoder": train_vae.DECODER,
        "encoder": train_vae.ENCODER,
    }
    for name, recipe in recipes.items():
        parser.add_argument(f"--{name}-steps", type=int, default=recipe.steps)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for name in recipes:
        recipes[name] = replace(recipes[name], steps=getattr(given, f"{name}_steps"))
    draft = train_draft.train_draft(given.work, recipes["draft"])
    train_highres.train_highres(given.work, draft, recipes["highres"])
    train_vae.train_decoder(given.work, recipes["decoder"])
    train_vae.train_encoder(given.work, recipes["encoder"])
    keep_weights(given.work, given.work / "weights")


if __name__ == "__main__":
    main()
