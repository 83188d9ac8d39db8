# SPDX-License-Identifier: Apache-2.0
"""The closed form of a decode on engines, against a count of the tensors of one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pw_bench.measure.tensor_ledger import Ledger
from pw_engines import EngineSpec
from pw_export.wan22_configs import VAE
from pw_runtime.execution.decoder import SegmentedVae
from pw_runtime.execution.decoder_segments import segments_of_decode
from pw_runtime.models import VaeDecoder
from pw_runtime.planning.engine_decode import engine_decode_memory
from pw_runtime.stages import decode
from pw_runtime.types import Compat, DecodeOrder, Latent, TilingConfig, VaeConfig
from tests.networks import TINY_VAE
from tests.stages.stores import Nowhere


class Nothing:
    """An engine that computes nothing: what it would compute with is in its scratch memory."""

    backend, padded, granularity, scratch = "tensorrt-rtx", True, 1, 0

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for out in outputs:
            out.zero_()


def counted(config: VaeConfig, tiling: TilingConfig, rows: int, columns: int) -> int:
    """Peak of all tensors of a decode of four latent frames, but weights and packed frames."""
    net = VaeDecoder(config).requires_grad_(False)
    segments = segments_of_decode(config, tiling, rows, columns)
    engines = {name: Nothing(segment.spec) for name, segment in segments.items()}
    latent = Latent(x=torch.zeros(48, 4, rows, columns))
    vae = SegmentedVae(net, segments, engines)
    with Ledger() as ledger:
        ledger.restart()
        chunks = decode.decode_frames(vae, latent, tiling, Compat(), "yuv420p", store=Nowhere())
        for chunk in chunks:
            packed = chunk.frames.numel()
            del chunk
    return ledger.peak["cpu"] - packed


@pytest.mark.parametrize("order", ["frames", "tiles"])
@pytest.mark.parametrize(
    ("config", "rows", "columns", "strips", "most"),
    [
        (TINY_VAE, 8, 24, 1, 1.25),  # of small pictures it counts too much rather than too little
        (TINY_VAE, 8, 48, 2, 1.25),
        pytest.param(VAE, 90, 160, 3, 1.05, marks=pytest.mark.slow),
    ],
    ids=["tiny", "two strips", "2k"],
)
def test_a_decode_on_engines_takes_what_the_plan_says(
    config: VaeConfig,
    rows: int,
    columns: int,
    strips: int,
    most: float,
    order: DecodeOrder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiling = TilingConfig(strips=strips, order=order)
    monkeypatch.setattr(decode, "is_finite", lambda x: True)
    with FakeTensorMode():
        wanted = counted(config, tiling, rows, columns)
    items = engine_decode_memory(config, tiling, 4, rows, columns, pinned=False)
    assert 0.95 * wanted <= sum(item.bytes for item in items) <= most * wanted
