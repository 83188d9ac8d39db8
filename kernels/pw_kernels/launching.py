# SPDX-License-Identifier: Apache-2.0
"""Kernels without a GPU: launched for tensors of any device, to be recorded or interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from pw_kernels.op import OPS, on_any_device


@contextmanager
def launching() -> Iterator[None]:
    """Run the launch of each of our operators in its place, whatever device its tensors are on.

    On meta tensors the launcher must record (`launcher.recording`), on a CPU Triton must interpret
    (TRITON_INTERPRET=1 before it is imported).
    """
    with on_any_device(), _Launching():
        yield


class _Launching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "pw":
            return func(*args, **(kwargs or {}))
        launch = OPS[name].launch
        assert launch is not None
        return launch(*args, **(kwargs or {}))
