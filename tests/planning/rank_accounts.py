# SPDX-License-Identifier: Apache-2.0
"""What ranks do in tests/planning/test_rank_memory.py: denoise a clip together under a ledger."""

from __future__ import annotations

import json
from dataclasses import replace

from pydantic import TypeAdapter
from torch import Tensor

from pw_bench.measure.tensor_ledger import Ledger
from pw_export import wan22_configs
from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.execution.divided_transformer import DividedDiT, form_groups
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.gathered_weights import GatheredWeights
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.execution.weight_streaming import ResidentWeights, Weights
from pw_runtime.models import WanDiT
from pw_runtime.presets import TWO_K
from pw_runtime.system.ranks import Ranks
from pw_runtime.types import TransformerPlan, VideoConfig
from tests.planning.accounts import run_stage

CONFIG = replace(
    wan22_configs.HIGHRES,
    dim=256,
    ffn_dim=768,
    num_heads=4,
    num_layers=3,
    text_dim=64,
    adapter_dim=32,
)
STAGE, VIDEO = replace(TWO_K, width=640, height=384, steps=3), VideoConfig(frames=17)
PLAN = TypeAdapter(TransformerPlan)


def peaks(ranks: Ranks, plans: str) -> list[int]:
    """Return the most bytes of tensors that live on this rank, for each plan.

    The less of two runs: on a busy machine the library's thread lets go of what an exchange has
    sent when the next tensors are there already.
    """
    cases = [PLAN.validate_python(values) for values in json.loads(plans)]
    return [min(_peak(ranks, plan), _peak(ranks, plan)) for plan in cases]


def _peak(ranks: Ranks, plan: TransformerPlan) -> int:
    net = WanDiT(CONFIG).requires_grad_(False)
    for weight in net.parameters():
        weight.zero_()
    segments = segments_of(CONFIG, "fp32", plan.chunk)
    groups = form_groups(ranks, plan.split)
    assert groups is not None
    weights: Weights = ResidentWeights(net, segments)
    kept: list[Tensor] = list(net.parameters())
    if plan.weights == "gathered":  # in a run, those of the blocks are in files
        weights = GatheredWeights(net, segments, "fp32", ranks, groups[0])
        kept = [w for name, w in net.named_parameters() if not is_streamed(name)]
        kept += [*weights._shares.values(), *(slot.run for slot in weights._slots.values())]
    with Ledger() as ledger:
        ledger.enter(kept, "weights")
        ledger.restart()
        divided = DividedDiT(
            net,
            segments,
            eager_engines(segments),
            weights,
            ranks,
            plan.split,
            "highres",
            share_attention=plan.share_attention,
            chunk=plan.chunk,
        )
        if ranks.rank == 0:
            run_stage(divided, CONFIG, STAGE, VIDEO)
            divided.close()
            ranks.command("end of a case")
        else:
            while (command := ranks.next_command())["name"] != "end of a case":
                if command["name"] != "release":
                    divided.follow(command)
    return ledger.peak["cpu"]
