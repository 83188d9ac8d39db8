# SPDX-License-Identifier: Apache-2.0
"""Memory by accounting: every tensor's bytes while it lives, and what lived at the peak.

Exact and the same on every machine: it counts tensors, not what an allocator or a library's
workspace adds. With fake tensors (torch._subclasses.FakeTensorMode) it counts full-size networks on
a GPU that is not there.
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
    """Within it, every new tensor storage is entered when it is made and struck when it dies.

    Attributes:
        live: bytes by device type, now.
        peak: most bytes by device type since the beginning or the last `restart`.
        at_peak: for each device type, bytes by what made them (operator and shape) at its peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.at_peak: dict[str, Counter[str]] = {}
        self._known: dict[int, Any] = {}  # id of a storage -> its weak reference
        self._made: dict[str, Counter[str]] = {}

    def enter(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            self._enter(tensor, name)

    def restart(self) -> None:
        """Forget the peak, not what lives."""
        self.peak = Counter(self.live)
        self.at_peak = {device: Counter(made) for device, made in self._made.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and enter what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf, f"{func.overloadpacket.__name__} {tuple(leaf.shape)}")
        return out

    def _enter(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        device, size = tensor.device.type, storage.nbytes()
        made = self._made.setdefault(device, Counter())

        def strike(_: Any) -> None:
            del self._known[key]
            self.live[device] -= size
            made[name] -= size

        self._known[key] = weakref.ref(storage, strike)
        self.live[device] += size
        made[name] += size
        if self.live[device] > self.peak[device]:
            self.peak[device] = self.live[device]
            self.at_peak[device] = +made

    def table(self, device: str, lines: int = 12) -> str:
        """The largest entries at the peak of a device, in MiB."""
        found = self.at_peak.get(device, Counter()).most_common(lines)
        return "\n".join(f"{size / 2**20:10.1f} MiB  {name}" for name, size in found)
