# SPDX-License-Identifier: Apache-2.0
"""The arithmetic worth a kernel, one operation per file.

Every function here is plain PyTorch: what the networks run on a CPU, and the oracle that any
faster implementation of the same operation is compared with.
"""

from pw_kernels.attention import attention
from pw_kernels.causal_conv3d import causal_conv3d
from pw_kernels.channel_norm import channel_norm
from pw_kernels.dup_up import dup_up
from pw_kernels.gate_residual import gate_residual
from pw_kernels.guide import guide
from pw_kernels.norm_modulate import norm_modulate
from pw_kernels.pack_frames import pack_frames, unpatchify_pixels
from pw_kernels.qk_norm_rope import rms_norm, rope

__all__ = [
    "attention",
    "causal_conv3d",
    "channel_norm",
    "dup_up",
    "gate_residual",
    "guide",
    "norm_modulate",
    "pack_frames",
    "rms_norm",
    "rope",
    "unpatchify_pixels",
]
