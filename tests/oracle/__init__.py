"""A plain second reading of the official recipe; the product is tested against it."""
