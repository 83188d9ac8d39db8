# SPDX-License-Identifier: Apache-2.0
"""Operations worth a kernel, one per file.

Every operation has a plain PyTorch reference: what the networks run on a CPU, and the oracle of
the kernels (docs/kernels.md).
"""

from pw_kernels.attention import attention, attention_with_lse
from pw_kernels.attention.chunked import chunked_attention
from pw_kernels.attention.merge import merge_attention
from pw_kernels.attention.sparse import sparse_attention
from pw_kernels.causal_conv3d import causal_conv3d
from pw_kernels.channel_norm import channel_norm
from pw_kernels.dup_up import dup_up_add
from pw_kernels.gate_residual import gate_residual
from pw_kernels.gate_residual_norm import gate_residual_norm
from pw_kernels.guided_update import Update, guided_update
from pw_kernels.norm_modulate import norm_modulate
from pw_kernels.pack_frames import pack_frames, unpatchify_pixels
from pw_kernels.pack_yuv import pack_yuv
from pw_kernels.qk_norm_rope import axis_pairs, qk_norm_rope, rms_norm, rope
from pw_kernels.upsample2x import phase_taps, upsample2x_conv

__all__ = [
    "Update",
    "attention",
    "attention_with_lse",
    "axis_pairs",
    "causal_conv3d",
    "channel_norm",
    "chunked_attention",
    "dup_up_add",
    "gate_residual",
    "gate_residual_norm",
    "guided_update",
    "merge_attention",
    "norm_modulate",
    "pack_frames",
    "pack_yuv",
    "phase_taps",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "sparse_attention",
    "unpatchify_pixels",
    "upsample2x_conv",
]
