# SPDX-License-Identifier: Apache-2.0
"""Memory of a process, sampled from outside."""

from __future__ import annotations

import os

from pw_bench.measure.memory_sampler import MemorySampler, between


def test_process_is_sampled_until_the_end_of_the_block() -> None:
    with MemorySampler(os.getpid(), None) as sampler:
        held = bytearray(64 * 2**20)
    assert sampler.host
    assert sampler.pss
    assert sampler.cpu[-1][1] > 0
    assert sampler.device == []
    assert max(size for _, size in sampler.host) > len(held)


def test_samples_of_an_interval_begin_at_zero() -> None:
    samples = [(1.0, 5), (2.0, 6), (3.0, 7)]
    assert between(samples, 1.5, 3.0) == ((0.5, 6), (1.5, 7))


def test_process_that_is_gone_gives_no_samples() -> None:
    with MemorySampler(2**22 + 1, None) as sampler:
        pass
    assert (sampler.host, sampler.pss, sampler.cpu) == ([], [], [])
