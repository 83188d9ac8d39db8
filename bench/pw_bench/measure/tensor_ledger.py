# SPDX-License-Identifier: Apache-2.0
"""Memory by accounting: the bytes of every tensor while it lives, and what lived at the peak.

Exact and the same on every machine: tensors are counted, not what an allocator or the workspace
of a library adds. With fake tensors (torch._subclasses.FakeTensorMode) it counts full-size
networks on a GPU that is not there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """A block in which every new tensor storage is counted from its allocation to its release.

    Attributes:
        live: bytes by device type, now.
        peak: most bytes by device type since the start or the last `restart`.
        at_peak: for each device type, bytes at its peak by origin (operator and shape).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.at_peak: dict[str, Counter[str]] = {}
        self._known: dict[int, Any] = {}  # id of a storage -> its weak reference
        self._by_origin: dict[str, Counter[str]] = {}

    def enter(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count tensors that exist already, under `name`."""
        for tensor in tensors:
            self._enter(tensor, name)

    def restart(self) -> None:
        """Reset the peak to what lives now."""
        self.peak = Counter(self.live)
        self.at_peak = {device: Counter(origins) for device, origins in self._by_origin.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its outputs."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf, f"{func.overloadpacket.__name__} {tuple(leaf.shape)}")
        return out

    def _enter(self, tensor: Tensor, origin: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        device, size = tensor.device.type, storage.nbytes()
        origins = self._by_origin.setdefault(device, Counter())

        def release(_: Any) -> None:
            del self._known[key]
            self.live[device] -= size
            origins[origin] -= size

        self._known[key] = weakref.ref(storage, release)
        self.live[device] += size
        origins[origin] += size
        if self.live[device] > self.peak[device]:
            self.peak[device] = self.live[device]
            self.at_peak[device] = +origins
