# SPDX-License-Identifier: Apache-2.0
"""Run kernels without a GPU: on meta tensors to record them, on CPU tensors to interpret them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from pw_kernels.op import OPS, ignore_device


@contextmanager
def dispatch_anywhere() -> Iterator[None]:
    """Run the launch function of each of our operators, whatever device its tensors are on.

    On meta tensors the launcher must be recording (`launcher.recording`); on a CPU Triton must
    interpret (TRITON_INTERPRET=1 before it is imported).
    """
    with ignore_device(), _RunLaunchFunctions():
        yield


class _RunLaunchFunctions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "pw":
            return func(*args, **(kwargs or {}))
        launch = OPS[name].launch
        assert launch is not None
        return launch(*args, **(kwargs or {}))
