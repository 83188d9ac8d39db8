# SPDX-License-Identifier: Apache-2.0
"""`pw build --target`: engines for GPUs that are not here, found by what a GPU can run."""

from __future__ import annotations

import sys

import pytest
import torch

from pw_engines import EngineStore
from pw_engines.tensorrt import rtx
from pw_export.build import build, unusable
from pw_export.build_jobs import TransformerSource, jobs_for, pick_compiler, platform_for
from pw_runtime.errors import BadRequest
from pw_runtime.execution.engine_lookup import Unavailable, keys_of, scratch_for
from pw_runtime.execution.transformer_segments import segments_of
from tests.networks import TINY_DRAFT

REASON = rtx.cannot_build(())
pytestmark = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
CPU = torch.device("cpu")
TARGETS = ("sm_120", "sm_89")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EngineStore:
    """A store with one engine, for two targets."""
    store = EngineStore(tmp_path_factory.mktemp("store") / "engines")
    source = TransformerSource(TINY_DRAFT, "bf16", 48)
    missing, stored = jobs_for(
        [source], "tensorrt-rtx", CPU, store, platform_for("tensorrt-rtx", CPU, TARGETS)
    )
    assert not stored
    (job,) = [job for job in missing if job.segment == "embed"]
    built = build(job)
    assert built.error is None
    assert built.parity == ()  # no GPU has compared it
    return store


def test_an_engine_is_found_for_each_of_its_targets(store: EngineStore) -> None:
    embed = segments_of(TINY_DRAFT, "bf16", 48)["embed"]
    for target, expected in (("sm_89", True), ("sm_120", True), ("sm_86", False)):
        keys = keys_of(embed, "tensorrt-rtx", rtx.platforms_of(target))
        assert any(store.find(key).path for key in keys) == expected


def test_it_is_of_use_though_no_gpu_is_here(store: EngineStore) -> None:
    (entry,) = store.entries(verify=True)
    assert entry.damage == ""
    assert unusable(entry) is None
    assert dict(entry.key["platform"])["targets"] == "sm_89 sm_120"


def test_its_scratch_memory_is_known_before_it_runs(store: EngineStore) -> None:
    segments = segments_of(TINY_DRAFT, "bf16", 48)
    found = scratch_for({"embed": segments["embed"]}, store, "sm_89")
    assert isinstance(found, int)
    assert found > 0
    assert scratch_for(segments, store, "sm_89") == Unavailable("block_in: not built yet")


def test_all_targets_by_default_and_aoti_by_itself() -> None:
    platform = dict(platform_for("tensorrt-rtx", CPU))
    assert platform["targets"] == "sm_80 sm_86 sm_89 sm_120 sm_121"
    assert pick_compiler("auto", None, CPU) == "aoti"
    assert pick_compiler("tensorrt-rtx", None, CPU) == "tensorrt-rtx"


def test_a_library_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in rtx.RTX.modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadRequest, match=r"pip install \"pixelwizard-runtime\[tensorrt-rtx\]\""):
        platform_for("tensorrt-rtx", CPU, ["sm_89"])
