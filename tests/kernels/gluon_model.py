# SPDX-License-Identifier: Apache-2.0
"""Run the Gluon attention kernel's own functions in fp64 over modelled barriers and copies.

The model covers what can go wrong between warps: a partition runs until it reaches a barrier, then
a random one continues; a copy arrives at a random later time, and its slot is NaN until then; a
product reads its operands when it is waited for. Layouts and the threads of a warpgroup are not
modelled.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from copy import copy
from types import FunctionType
from types import SimpleNamespace as Names
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

from pw_kernels._triton import attention_gluon


class Machine:
    """The partitions of one program, of which one runs at a time, and the copies in flight."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.waiting: set[int] = set()
        self.error: BaseException | None = None

    def run(self, partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]], *_: Any) -> None:
        """Run all to their end; raise what the first to fail raised."""
        self.alive = list(range(len(partitions)))
        self.turns = [threading.Semaphore(0) for _ in partitions]
        self.products: list[list[Product]] = [[] for _ in partitions]
        threads = [
            threading.Thread(target=self._run_partition, args=(i, *partition))
            for i, partition in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        self._hand_over()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _run_partition(
        self, i: int, function: Callable[..., None], arguments: Sequence[Any]
    ) -> None:
        try:
            self._take_over(i)
            function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        self.alive.remove(i)
        self._hand_over()

    def _hand_over(self) -> None:
        if self.alive:
            self.current = self.random.choice(self.alive)
            self.turns[self.current].release()

    def _take_over(self, i: int) -> None:
        self.turns[i].acquire()
        if self.error:
            raise self.error

    def pause(self) -> None:
        """Let other partitions, or a copy, come first."""
        if self.copies and self.random.random() < 0.2:
            self.land()
        me = self.current
        self._hand_over()
        self._take_over(me)

    def land(self) -> None:
        """Complete any of the copies in flight."""
        self.copies.pop(self.random.randrange(len(self.copies)))()

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Pause until `is_done`."""
        self.pause()
        while not is_done():
            self.waiting.add(self.current)
            if self.waiting >= set(self.alive):
                assert self.copies, "deadlock"
                self.land()
            self.pause()
        self.waiting.discard(self.current)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes expected have come."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.phase, self.bytes = machine, 0, 0

    def init(self, count: int) -> None:
        """Set how many arrivals a phase takes."""
        self.count = self.missing = count

    def add(self, arrivals: int, expected: int) -> None:
        """Count arrivals and bytes expected, or come where negative."""
        assert self.missing >= arrivals, "an arrival too many"
        self.missing -= arrivals
        self.bytes += expected
        if self.missing == self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count
        self.machine.waiting.clear()


class Slot:
    """A tile in shared memory, and the products in flight that read it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype
        self.products: set[Product] = set()

    def permute(self, order: tuple[int, int]) -> Slot:
        """The same slot, read in another order."""
        other = copy(self)
        other.data = self.data.permute(order)
        return other


class Product:
    """A product in flight: a b + acc, which needs its operands until it is finished."""

    def __init__(self, a: Any, b: Any, acc: Tensor) -> None:
        self.operands, self.acc = (a, b), acc
        self.slots = [x for x in (a, b) if isinstance(x, Slot)]
        for slot in self.slots:
            assert not slot.data.isnan().any(), "read before it arrived"
            slot.products.add(self)

    def finish(self) -> None:
        """Read the operands as they are now."""
        a, b = (x.data if isinstance(x, Slot) else x for x in self.operands)
        self.result = self.acc + a @ b
        for slot in self.slots:
            slot.products.remove(self)


class Pointer:
    """A pointer into `flat`, or a tensor of them."""

    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset, self.dtype = flat, offset, Names(element_ty=flat.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + more)

    def load(self, mask: Tensor, other: float) -> Tensor:
        """Return the values, and `other` where not `mask`."""
        values = torch.full(self.offset.shape, other, dtype=self.flat.dtype)
        values[mask] = self.flat[self.offset[mask]]
        return values

    def store(self, value: Tensor, mask: Tensor) -> None:
        """Write where nothing was written before."""
        inside = mask.expand(self.offset.shape)
        assert self.flat[self.offset[inside]].isnan().all(), "written twice"
        self.flat[self.offset[inside]] = value[inside]


class Rows:
    """A tensor descriptor: what lies past the last row reads as zeros."""

    def __init__(
        self, base: Pointer, shape: list[int], strides: list[int], block: list[int], _: None
    ) -> None:
        self.data, self.block = base.flat.as_strided(shape, strides), block
        self.block_type = Names(nbytes=math.prod(block))

    def read(self, row: int, column: int) -> Tensor:
        """A block of the tensor."""
        inside = self.data[row : row + self.block[0], column : column + self.block[1]]
        return torch.nn.functional.pad(inside, (0, 0, 0, self.block[0] - inside.shape[0]))


def _names(machine: Machine, program: int, programs: int) -> dict[str, Any]:
    """Return models of what the kernel's functions call."""

    def fetch(rows: Rows, origin: list[int], full: Barrier, slot: Slot) -> None:
        machine.pause()
        assert not slot.products, "overwritten while it is read"
        slot.data.fill_(math.nan)

        def arrive() -> None:
            slot.data.copy_(rows.read(*origin))
            full.add(0, -rows.block_type.nbytes)

        machine.copies.append(arrive)

    def multiply(a: Any, b: Any, acc: Tensor, *, is_async: bool, use_acc: bool = True) -> Product:
        product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
        machine.products[machine.current].append(product)
        return product

    def finish(pending: int, deps: list[Any]) -> Any:
        machine.pause()
        products = machine.products[machine.current]
        while len(products) > pending:
            products.pop(0).finish()
        results = [x.result if isinstance(x, Product) else x for x in deps]
        return results[0] if len(results) == 1 else results

    def allocate(dtype: torch.dtype, shape: list[int], layout: None) -> Names:
        is_barrier = dtype == torch.int64
        tiles = torch.full(shape, math.nan, dtype=torch.float64)
        slots = [Barrier(machine) if is_barrier else Slot(tile) for tile in tiles]
        return Names(index=slots.__getitem__, shape=shape)

    def wait(barrier: Barrier, parity: int) -> None:
        machine.wait(lambda: barrier.phase != parity)

    def no_layout(*_: Any) -> None:
        return None

    return {
        "range": range,
        "float": float,
        "mbarrier": Names(
            MBarrierLayout=no_layout,
            init=Barrier.init,
            wait=wait,
            expect=lambda barrier, size: barrier.add(1, size),
            arrive=lambda barrier: barrier.add(1, 0),
        ),
        "tma": Names(make_tensor_descriptor=Rows),
        "load_tile": fetch,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": finish,
        "gl": Names(
            NVMMASharedLayout=no_layout,
            NVMMADistributedLayout=no_layout,
            DotOperandLayout=no_layout,
            SliceLayout=no_layout,
            allocate_shared_memory=allocate,
            warp_specialize=machine.run,
            static_range=range,
            static_assert=lambda holds: None,
            program_id=lambda axis: program,
            num_programs=lambda axis: programs,
            cdiv=lambda a, b: -(-a // b),
            int64=torch.int64,
            float32=torch.float64,
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            convert_layout=lambda x, layout: x,
            load=Pointer.load,
            store=Pointer.store,
            where=torch.where,
            max=torch.amax,
            sum=torch.sum,
            maximum=torch.maximum,
            exp2=torch.exp2,
            log2=torch.log2,
        ),
    }


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    programs: int,
    keys: int,
    stages: int,
    seed: int,
    **changed: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of the kernel with 2 x 4 queries a tile; `changed` replaces parts of mbarrier."""
    out = torch.full_like(q, math.nan)
    lse = torch.full_like(q[:, :, 0], math.nan)
    log2e = math.log2(math.e)
    for program in range(programs):
        names = _names(Machine(seed), program, programs)
        names |= {"ROWS": 4, "CONSUMERS": 2, "LN2": math.log(2), "LOG2E": log2e}
        for name, function in vars(attention_gluon).items():
            if isinstance(function, GluonJITFunction):
                names[name] = FunctionType(function.fn.__code__, names)
        vars(names["mbarrier"]).update(changed)
        names["kernel"](
            *(Pointer(x.view(-1)) for x in (q, k, v, out, lse)),
            *(len(q), len(k), q.shape[1]),
            *(x.shape[1] * x.shape[2] for x in (q, k, v)),
            log2e * q.shape[2] ** -0.5,
            *(q.shape[2], 8, keys, stages),
        )
    return out, lse
