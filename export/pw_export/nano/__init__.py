# SPDX-License-Identifier: Apache-2.0
"""The small built-in model in the official layout, with random weights for tests or trained."""

from pw_export.nano.random_weights import (
    NANO_DIT,
    NANO_HIGHRES,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    write_byte_tokenizer,
    write_nano_checkpoint,
)

__all__ = [
    "NANO_DIT",
    "NANO_HIGHRES",
    "NANO_TEXT_ENCODER",
    "NANO_VAE",
    "write_byte_tokenizer",
    "write_nano_checkpoint",
]
