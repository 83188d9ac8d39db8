# SPDX-License-Identifier: Apache-2.0
"""The processes that make one clip together, one per device, and how they exchange tensors.

They move data and never add any up: a sum over ranks depends on their number. Rank 0 runs the
program; the others wait for its commands. Every wait has a deadline and ends as soon as a rank is
known to have died (rank_watch.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from pw_runtime.errors import RankFailed
from pw_runtime.system.rank_watch import IDLE, RankWatch, failure_text, teller

DEADLINE: Final = 600.0  # seconds that one rank waits for the data of another
_LOOK: Final = 0.2  # seconds between two looks at the watch while waiting
_LEARN: Final = 20.0  # seconds within which the watch learns of a rank that is gone
_LIBRARY: Final = timedelta(days=20)  # the libraries' own deadline: ours comes first
_GO_ON: Final = (
    "see what that rank printed and whether its device works; finish clips by the commands above, "
    "if there are any, and the same command again goes on with the others"
)


@dataclass(slots=True)
class Pending:
    """An exchange in progress; `wait` before its tensors are read or written."""

    ranks: Ranks | None = None
    work: dist.Work | None = None
    what: str = ""
    group: Group | None = None
    tensors: tuple[Tensor, ...] = ()  # kept alive until then
    patient: bool = False
    _done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Wait; work queued on a GPU from now on then sees the result. Raises RankFailed."""
        if self.work is None or self.ranks is None or self.group is None:
            return
        if self.tensors[0].device.type == "cpu":
            self.ranks.wait_for(self._done, self.what, self.group, patient=self.patient)
        try:
            self.work.wait()
        except RuntimeError as error:  # the connection to a rank broke
            self.ranks.lost(self.group, error)
        self.work, self.tensors = None, ()


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks, in order, that exchange tensors.

    Attributes:
        name: tells groups with the same members apart.
        members: their numbers among all ranks.
        rank: number of this process in the group.
        handle: of the library; None for a group of one.
    """

    name: str
    members: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)


class Ranks:
    """This process among the others.

    Attributes:
        rank: its number.
        size: how many there are.
        device: it computes on.
        sent: bytes that this rank sent to others, by kind of operation.
    """

    def __init__(
        self,
        store: Store,
        watch: RankWatch,
        rank: int,
        size: int,
        device: torch.device,
        deadline: float = DEADLINE,
    ) -> None:
        """Form the group of all ranks; all of them must do so at the same time."""
        self.rank, self.size, self.device = rank, size, device
        self.sent: dict[str, int] = {}
        self._watch, self._deadline = watch, deadline
        self._waiting = threading.Event()
        watch.woken = self._waiting.set
        # Groups of tensors on GPUs are beside those of the host: NCCL alone keeps its own deadline.
        dist.init_process_group(
            "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=_LIBRARY,
        )
        self._groups: dict[tuple[str, tuple[int, ...], str], Group] = {}
        everyone = tuple(range(size))
        self.all = Group("all", everyone, rank, dist.group.WORLD)
        for place in dict.fromkeys(("cpu", device.type)):
            self.group("all", everyone, place)
            for one in range(size):
                for other in range(size):
                    if one != other and (other in (0, one + 1) or one == 0):
                        self.group(f"{one} to {other}", tuple(sorted((one, other))), place)

    # ---- groups ------------------------------------------------------------------------------

    def group(self, name: str, members: tuple[int, ...], place: str = "") -> Group | None:
        """Return a group, which is formed at its first use; None where this rank is no member.

        All ranks must ask for the same groups in the same order.

        Args:
            name: of the group.
            members: in ascending order.
            place: type of the device of the tensors that they exchange; by default the ranks'.
        """
        key = (name, members, place or self.device.type)
        if key not in self._groups:
            handle = None
            if len(members) > 1:
                on_host = key[2] == "cpu"
                limit = _LIBRARY if on_host else timedelta(seconds=self._deadline)
                backend = "gloo" if on_host else "nccl"
                handle = dist.new_group(list(members), timeout=limit, backend=backend)
            rank = members.index(self.rank) if self.rank in members else -1
            self._groups[key] = Group(f"{name} ({key[2]})", members, rank, handle)
        group = self._groups[key]
        return group if group.rank >= 0 else None

    # ---- exchanges ---------------------------------------------------------------------------

    def exchange(
        self,
        group: Group,
        result: Tensor,
        x: Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        what: str,
    ) -> Pending:
        """Send a part of x to every member of a group, and receive one of each.

        Args:
            group: of this rank.
            result: [sum(received)], filled in the order of the members.
            x: [sum(sent)], the parts in the order of the members.
            received: numbers that come from each.
            sent: numbers that go to each.
            what: names the operation.
        """
        _check(what, result, x)
        if (len(result), len(x)) != (sum(received), sum(sent)) or x.dtype != result.dtype:
            raise ValueError(f"{what}: {len(x)} and {len(result)} numbers for {sent}, {received}")
        if group.handle is None:
            result.copy_(x)
            return Pending()
        self._count(what, (sum(sent) - sent[group.rank]) * x.element_size())
        return self._begun(
            group,
            what,
            (result, x),
            lambda: dist.all_to_all_single(
                result, x, list(received), list(sent), group=group.handle, async_op=True
            ),
        )

    def gather(self, group: Group, result: Tensor, x: Tensor, what: str) -> Pending:
        """Collect x, [n], of every member of a group: result is [members * n]."""
        _check(what, result, x)
        if len(result) != group.size * len(x) or x.dtype != result.dtype:
            raise ValueError(f"{what}: {len(x)} numbers of {group.size} ranks for {len(result)}")
        if group.handle is None:
            result.copy_(x)
            return Pending()
        self._count(what, x.numel() * x.element_size() * (group.size - 1))
        return self._begun(
            group,
            what,
            (result, x),
            lambda: _all_gather(result, x, group=group.handle, async_op=True),
        )

    def broadcast(
        self, x: Tensor, what: str, *, source: int = 0, group: Group | None = None
    ) -> Pending:
        """Send x from one rank to the others of a group, which receive it in place.

        Args:
            x: without gaps.
            what: names the operation.
            source: the sending rank's number among all.
            group: of this rank; None: all.
        """
        group = group or self._groups["all", self.all.members, x.device.type]
        if self.rank == source:
            self._count(what, x.numel() * x.element_size() * (group.size - 1))
        return self._cast(group, x, source, what)

    def send(self, x: Tensor, to: int, what: str) -> Pending:
        """Send x to a rank, which must `receive` it: in order, from this rank to that one."""
        self._count(what, x.numel() * x.element_size())
        return self._cast(self._lane(self.rank, to, x), x, self.rank, what)

    def receive(self, x: Tensor, of: int, what: str, *, patient: bool = False) -> Pending:
        """Receive into x what a rank sends, of the same size and dtype.

        A patient wait lasts as long as that rank lives: it may be busy with what takes any time.
        """
        pending = self._cast(self._lane(of, self.rank, x), x, of, what)
        pending.patient = patient
        return pending

    # ---- commands ----------------------------------------------------------------------------

    def command(self, name: str, **details: Any) -> None:
        """Tell all other ranks, from rank 0, what to do next.

        A busy rank keeps some of the others in one of the two messages, and some have both already.
        None went another way: both are IDLE, and commands are counted as they end.
        """
        data = json.dumps({"name": name, **details}).encode()
        size = torch.tensor([len(data)])
        self.broadcast(size, IDLE).wait()
        self.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), IDLE).wait()
        self._watch.commanded()

    def next_command(self) -> dict[str, Any]:
        """Wait, as long as rank 0 lives, for what to do next. Raises RankFailed."""
        size = torch.zeros(1, dtype=torch.int64)
        pending = self.broadcast(size, IDLE)
        pending.patient = True
        pending.wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(data, IDLE).wait()
        self._watch.commanded()
        return dict(json.loads(data.numpy().tobytes()))

    # ---- waiting -----------------------------------------------------------------------------

    def at(self, place: str) -> None:
        """Say in which stage and step this rank is, for the messages of the others."""
        self._watch.at(place)

    def wait_for(
        self, done: threading.Event, what: str, group: Group, *, patient: bool = False
    ) -> None:
        """Wait for an exchange on CPUs. Raises RankFailed."""
        end = float("inf") if patient else time.monotonic() + self._deadline
        self._watch.waits(group.members, what)
        while not done.wait(_LOOK):
            if self._watch.failure is not None:
                raise self._failed()
            if time.monotonic() > end:
                rank, doing = self._watch.behind(group.name, group.members)
                waited = f"let rank {self.rank} wait for {self._deadline:.0f} s (--rank-timeout)"
                self._watch.report(rank, waited, doing)
                raise self._failed()
        self._watch.waits((), "")

    def lost(self, group: Group, error: Exception) -> NoReturn:
        """Find out which rank an exchange broke off with. Raises RankFailed."""
        self._waiting.wait(_LEARN)
        if self._watch.failure is None:
            rank, doing = self._watch.behind(group.name, group.members)
            self._watch.report(rank, f"broke off ({_reason(error)})", doing)
        raise self._failed()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one cannot go on; rank 0 tells its user itself."""
        text = f"failed: {str(error) or type(error).__name__}"
        self._watch.report(self.rank, text, self._watch.doing, told=self.rank == 0)

    @property
    def failed(self) -> bool:
        """True where the run is over, because of any rank."""
        return self._watch.failure is not None

    def close(self) -> None:
        """Leave the others. After a failure, `broken` says that libraries still wait for them."""
        self._watch.close()
        if self._watch.failure is None:
            dist.destroy_process_group()
        else:
            _BROKEN.set()

    def _refused(self, error: Exception) -> NoReturn:
        """End the run because this rank cannot begin an exchange, unless another one is gone.

        The error is no `__cause__`: "out of memory" in it would ask for a smaller plan.
        """
        self._waiting.wait(_LEARN)
        self.fail(RuntimeError(_reason(error)))
        raise self._failed()

    def _failed(self) -> RankFailed:
        failure = self._watch.failure
        assert failure is not None
        error = RankFailed(failure_text(failure), do=_GO_ON)
        error.teller = teller(failure)
        return error

    def _lane(self, one: int, other: int, x: Tensor) -> Group:
        """Return the group through which one rank sends to another what is where x is."""
        return self._groups[f"{one} to {other}", tuple(sorted((one, other))), x.device.type]

    def _cast(self, group: Group, x: Tensor, source: int, what: str) -> Pending:
        if not x.is_contiguous():
            raise ValueError(f"{what}: a tensor with gaps")
        if group.handle is None:
            return Pending()
        return self._begun(
            group,
            what,
            (x,),
            lambda: dist.broadcast(x, source, group=group.handle, async_op=True),
        )

    def _begun(
        self, group: Group, what: str, tensors: tuple[Tensor, ...], begin: Callable[[], Any]
    ) -> Pending:
        if self._watch.failure is not None:
            raise self._failed()
        self._watch.begin(group.name, what)
        try:
            work = begin()
        except RuntimeError as error:
            self._refused(error)
        pending = Pending(self, work, what, group, tensors)
        if tensors[0].device.type == "cpu":
            work.get_future().add_done_callback(lambda _: pending._done.set())
        return pending

    def _count(self, what: str, size: int) -> None:
        kind = what.split(" of ")[0]
        self.sent[kind] = self.sent.get(kind, 0) + size


def _reason(error: Exception) -> str:
    """Return the first and the last line of a library's message: NCCL ends with the cause."""
    text = str(error).partition("\nException raised from")[0]  # before the C++ stack
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ": ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else type(error).__name__


def _check(what: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dim() != 1 or not x.is_contiguous():
            raise ValueError(f"{what}: a flat tensor without gaps, got {tuple(x.shape)}")


# Its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_BROKEN = threading.Event()


def broken() -> bool:
    """Tell whether this process must end by `os._exit`: a library waits for a rank that is gone."""
    return _BROKEN.is_set()
