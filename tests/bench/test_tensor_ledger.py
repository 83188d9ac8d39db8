# SPDX-License-Identifier: Apache-2.0
"""The ledger counts live tensors once, and keeps what was live at the peak."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pw_bench.measure.tensor_ledger import Ledger


def test_counts_storages_once_and_until_they_are_released():
    with Ledger() as ledger:
        a = torch.empty(1000)
        b = a + 1
        view = b.view(10, 100)[3:]
        del a, b
        c = torch.empty(250)
        del c
    assert ledger.live == {"cpu": 4000}  # the view holds all of b
    assert ledger.peak == {"cpu": 8000}
    assert ledger.at_peak["cpu"] == {"empty (1000,)": 4000, "add (1000,)": 4000}
    assert view.numel() == 700


def test_restart_forgets_the_peak_and_keeps_what_lives():
    with Ledger() as ledger:
        kept = torch.empty(1000)
        ledger.enter([kept], "again")  # known already
        torch.empty(5000)
        ledger.restart()
        torch.empty(2000)
    assert ledger.peak == {"cpu": 12000}
    assert len(kept) == 1000


def test_counts_a_gpu_that_is_not_there():
    with FakeTensorMode(), Ledger() as ledger:
        x = torch.empty(10**6, 10**5, device="cuda:0")
        x.to("cpu")
    assert ledger.peak == {"cuda": 4 * 10**11, "cpu": 4 * 10**11}
