# SPDX-License-Identifier: Apache-2.0
"""Where workers go, and what they must have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.fleet.agreement import (
    differing_machines,
    require_same_libraries,
    require_same_versions,
    with_budget,
)
from pw_runtime.fleet.cluster import refused
from pw_runtime.fleet.layout import Layout, Node, lay_out
from pw_runtime.fleet.messages import Joined
from pw_runtime.presets import PRESETS
from pw_runtime.types import Prompt, Request

GIB = 2**30
VERSIONS = {"pixelwizard-runtime": "0.1.0", "torch": "2.13.0", "av": "18.1.0", "host": "here"}


def node(name: str, cpus: int = 16, gpus: int = 0) -> Node:
    return Node(name=name, cpus=cpus, gpus=gpus, memory_bytes=64 * GIB)


def counts(layout: Layout) -> dict[str, int]:
    return {found.name: count for found, count in layout.places}


def test_each_gpu_gets_a_worker_with_its_share_of_the_cpus() -> None:
    layout = lay_out([node("head"), node("a", 64, 8), node("b", 16, 2)], None, None, None)
    assert counts(layout) == {"a": 8, "b": 2}
    assert (layout.gpus, layout.cpus, layout.workers) == (1, 8, 10)


def test_without_gpus_each_cpu_gets_a_worker() -> None:
    layout = lay_out([node("a", 2), node("b", 1), node("head", 0)], None, None, None)
    assert counts(layout) == {"a": 2, "b": 1}
    assert (layout.gpus, layout.cpus) == (0, 1)


def test_fewer_workers_are_spread_over_the_nodes() -> None:
    assert counts(lay_out([node("a"), node("b")], 0, 4, 5)) == {"a": 3, "b": 2}
    assert counts(lay_out([node("a"), node("b")], 0, 4, 1)) == {"a": 1}


def test_nodes_of_one_host_count_together() -> None:
    assert lay_out([node("a", 2), node("a", 3)], 0, 1, None).by_host == {"a": 5}


@pytest.mark.parametrize(("gpus", "cpus"), [(1, 1), (0, 32)])
def test_a_cluster_without_room_is_one_error(gpus: int, cpus: int) -> None:
    with pytest.raises(BadRequest, match="no node of the cluster has room") as caught:
        lay_out([node("a")], gpus, cpus, None)
    assert "a: 0 GPUs, 16 CPUs" in str(caught.value)
    assert f"{cpus} CPU" in str(caught.value)


def test_a_worker_of_several_gpus_is_on_one_node_with_a_process_on_each() -> None:
    nodes = [node("a", 64, 8), node("b", 16, 2), node("c", 32, 7)]
    layout = lay_out(nodes, 4, None, None)
    assert counts(layout) == {"a": 2, "c": 1}
    assert (layout.gpus, layout.processes, layout.cpus) == (4, 4, 18)
    assert layout.each == "4 GPUs and 18 CPUs, 4 processes that make each clip together"


def test_a_worker_of_several_processes_has_a_cpu_for_each() -> None:
    layout = lay_out([node("a", 5), node("b", 1)], None, None, None, 2)
    assert counts(layout) == {"a": 2}
    assert (layout.gpus, layout.processes, layout.cpus) == (0, 2, 2)


def test_without_a_node_of_so_many_gpus_the_error_names_the_largest() -> None:
    nodes = [node("a", 64, 2), node("b", 16, 4), node("c", 128)]
    with pytest.raises(BadRequest, match="no node of the cluster has room") as caught:
        lay_out(nodes, 8, None, None)
    assert "got: b: 4 GPUs, 16 CPUs, the largest of 3 nodes\n  wanted: 8 GPUs" in str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "cpus", "message"),
    [
        (None, None, "one process on each of its GPUs"),
        (4, None, "one process on each of its GPUs"),
        (0, 1, "at least one CPU of its own"),
    ],
)
def test_processes_that_contradict_the_gpus_or_cpus_are_one_error(
    gpus: int | None, cpus: int | None, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        lay_out([node("a", 16, 8)], gpus, cpus, None, 2)


@pytest.mark.parametrize(("prompts", "batch"), [(1, 1), (6, 1), (7, 2), (24, 4), (1000, 4)])
def test_batches_leave_every_worker_several(prompts: int, batch: int) -> None:
    assert lay_out([node("a", 2)], 0, 1, None).batch(prompts) == batch


def test_another_version_of_the_project_is_refused_by_name() -> None:
    require_same_versions("w1", VERSIONS, "0.1.0")
    with pytest.raises(BadRequest, match=r"w1 on here has another version") as caught:
        require_same_versions("w1", VERSIONS, "0.2.0")
    assert "got: 0.1.0\n  wanted: 0.2.0" in str(caught.value)


def test_other_libraries_than_those_of_the_first_worker_are_refused() -> None:
    require_same_libraries("w1", VERSIONS | {"host": "there"}, "w0", VERSIONS)
    with pytest.raises(BadRequest, match="depend on who makes it") as caught:
        require_same_libraries("w1", VERSIONS | {"torch": "2.14.1"}, "w0", VERSIONS)
    assert "got: torch 2.14.1\n  wanted: torch 2.13.0" in str(caught.value)


def joined(
    host: str, *, free: int | None = 64 * GIB, gpu: int | None = None, **machine: str
) -> Joined:
    return Joined(
        host=host,
        shares_output=True,
        machine=dict(machine),
        host_bytes=free,
        process_bytes=GIB,
        gpu_bytes=gpu,
    )


def request(**changes: int) -> Request:
    return Request(prompts=(Prompt("a cat"),), preset=PRESETS["nano"], out=Path("out"), **changes)  # type: ignore[arg-type]


def test_free_memory_is_that_of_the_scarcest_machine_divided_among_its_workers() -> None:
    workers = {"w0": joined("a"), "w1": joined("b", free=48 * GIB), "w2": joined("b")}
    assert with_budget(request(), workers, {}).host_memory == 24 * GIB + GIB
    planned = with_budget(request(), workers, {"a": 1, "b": 4})
    assert planned.host_memory == 12 * GIB + GIB


def test_the_smallest_gpu_decides_for_all() -> None:
    workers = {"w0": joined("a", gpu=80 * GIB), "w1": joined("b", gpu=24 * GIB)}
    assert with_budget(request(), workers, {}).gpu_memory == 24 * GIB
    assert with_budget(request(), {"w0": joined("a")}, {}).gpu_memory is None


def test_a_budget_that_was_asked_for_is_each_workers() -> None:
    workers = {"w0": joined("a", free=None, gpu=80 * GIB)}
    budget = with_budget(request(host_memory=GIB, gpu_memory=2 * GIB), workers, {})
    assert (budget.host_memory, budget.gpu_memory) == (GIB, 2 * GIB)
    with pytest.raises(BadRequest, match="cannot determine the free memory of a"):
        with_budget(request(), workers, {})


def test_machines_that_round_differently_are_named() -> None:
    same = {"w0": joined("a", gpu=1, processor="x"), "w1": joined("b", processor="x")}
    assert differing_machines(same) is None
    text = differing_machines(same | {"w2": joined("c", processor="y")})
    assert text is not None
    assert text.endswith("processor: x (2), y (1)")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.9"), "another ver"),
        (RuntimeError("Failed to connect to Ray cluster"), "at here:1 does not take this driver"),
    ],
)
def test_what_ray_says_becomes_one_clear_error(error: Exception, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        raise refused("here:1", error)
