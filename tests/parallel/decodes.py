# SPDX-License-Identifier: Apache-2.0
"""What ranks do in tests/parallel/test_decode_ranks.py."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from pw_runtime.errors import BadWeights
from pw_runtime.execution.protocols import Decoder
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.finite import require_finite_weights
from pw_runtime.planning.oom_fallback import out_of_memory
from pw_runtime.stages.decode import decode_frames, decode_share
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.tensor_messages import receive_mark, receive_tensor, send_tensor
from pw_runtime.types import Compat, FrameChunk, Latent, PixelFormat, TilingConfig
from tests.networks import TINY_VAE
from tests.oracle import golden
from tests.stages.test_decode_orders import InStrips


class Case(NamedTuple):
    """A clip, and how it is decoded."""

    rows: int
    columns: int
    frames: int
    strips: int
    pixels: PixelFormat = "yuv420p"
    on: Literal["torch", "bf16", "engines"] = "torch"
    truncating: bool = False


CASES = (
    Case(45, 1, 3, 3),
    Case(45, 1, 4, 3, "rgb24", truncating=True),
    Case(33, 2, 1, 2, "rgb24"),  # fewer frames than ranks
    Case(29, 1, 2, 5),  # runs of one and of two bands
    Case(60, 1, 5, 5, "rgb24"),
    Case(20, 1, 3, 1),  # one band: the other ranks have nothing to do
    Case(45, 1, 3, 3, on="bf16"),
    Case(1, 23, 3, 3, on="engines"),
    Case(1, 31, 2, 4, "rgb24", on="engines"),
)


def network(dtype: torch.dtype = torch.float32) -> VaeDecoder:
    weights = golden.load("vae_tiny_weights")
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net.to(dtype)


def latent(case: Case, seed: int = 7) -> Latent:
    generator = torch.Generator().manual_seed(seed)
    return Latent(
        x=torch.randn(48, case.frames, case.rows, case.columns, generator=generator),
    )


def decoded(
    ranks: Ranks | None, net: Decoder, case: Case, advance: Callable[[float], object] = id
) -> list[FrameChunk]:
    """Decode a clip on this rank, alone or with the others; what rank 0 returns."""
    z, tiling = latent(case), TilingConfig(strips=case.strips)
    compat = Compat(truncating_uint8=case.truncating)
    if ranks is None or ranks.rank == 0:
        frames = decode_frames(net, z, tiling, compat, case.pixels, advance=advance, ranks=ranks)
        with closing(frames):
            return list(frames)
    decode_share(net, z, tiling, compat, case.pixels, ranks=ranks)
    return []


def same(ours: list[FrameChunk], theirs: list[FrameChunk]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a.start == b.start and torch.equal(a.frames, b.frames) for a, b in pairs)


def whole_clips(ranks: Ranks) -> object:
    """Decode every clip: its bits, its progress, and what was sent."""
    results = []
    for case in CASES:
        net: Decoder = network(torch.bfloat16 if case.on == "bf16" else torch.float32)
        if case.on == "engines":
            net = InStrips(net)  # type: ignore[assignment, arg-type]
        ranks.sent.clear()
        counted: list[float] = []
        chunks = decoded(ranks, net, case, counted.append)
        bits = [(chunk.start, digest(chunk.frames)) for chunk in chunks]
        results.append((bits, counted, dict(ranks.sent)))
    return results


def digest(frames: Tensor) -> str:
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()


class Faulty:
    """A decoder of which one band of one latent frame goes wrong."""

    exact_tiling: Literal["bands"] = "bands"

    def __init__(self, net: VaeDecoder, fault: Callable[[Tensor], Tensor], at: int) -> None:
        self.config, self.modules, self._net = net.config, net.modules, net
        self.global_part, self._fault, self._left = net.global_part, fault, at
        self.coarse, self.fine = net.coarse, net.fine

    def local_part(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Count the bands of this rank, one of each frame."""
        self._left -= 1
        colours = self._net.local_part(x, cache)
        return self._fault(colours) if self._left == -1 else colours

    def check_weights(self) -> None:
        """Raise BadWeights."""
        require_finite_weights(self._net)


def not_a_number(colours: Tensor) -> Tensor:
    return torch.cat((colours[..., :-1], colours[..., -1:] * float("nan")), dim=-1)


def no_memory(colours: Tensor) -> Tensor:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def no_word(colours: Tensor) -> Tensor:
    raise MemoryError


FAULTY = Case(60, 1, 5, 4)  # on four ranks, a band for each
TAKEN = (1, 3, 5)  # chunks after which it is closed


def faults(ranks: Ranks) -> object:
    """Let each rank go wrong in turn, at the first, the last and other frames.

    Between them, and at the end, a clip goes well. Returns the errors of rank 0.
    """
    net, told = network(), []
    good = decoded(None, net, FAULTY)
    for rank in range(ranks.size):
        for fault, at in ((not_a_number, 0), (not_a_number, 4), (no_memory, 2), (no_word, 3)):
            wrong = Faulty(net, fault, at) if rank == ranks.rank else net
            try:
                decoded(ranks, wrong, FAULTY)
                error: Exception | None = None
            except Exception as raised:
                error = out_of_memory(raised) or raised
            told.append((fault.__name__, rank, at, type(error), str(error)))
        again = decoded(ranks, net, FAULTY)
        assert ranks.rank or same(again, good)
    return told


def no_room_for_rows(ranks: Ranks) -> object:
    """Let rank 1 lack the memory for some rows that arrive; then a clip goes well.

    Returns the error of rank 0.
    """
    net, good, empty = network(), decoded(None, network(), FAULTY), torch.empty_strided
    arrived = 0

    def full(*arguments: Any, **options: Any) -> Tensor:
        nonlocal arrived
        arrived += 1
        if arrived == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*arguments, **options)

    error = None
    with patch.object(torch, "empty_strided", full if ranks.rank == 1 else empty):
        try:
            decoded(ranks, net, FAULTY)
        except RuntimeError as raised:
            error = str(raised)
    again = decoded(ranks, net, FAULTY)
    assert ranks.rank or same(again, good)
    return error, arrived > 3


def bad_weights(ranks: Ranks) -> object:
    """Decode with a weight that is not a number, on every rank; return what rank 0 raises."""
    net = network()
    net.decoder.head["2"].bias[3] = float("nan")  # type: ignore[index, union-attr, operator]
    try:
        decoded(ranks, net, FAULTY)
    except BadWeights as error:
        return str(error)
    return None


def closed_early(ranks: Ranks) -> object:
    """Close a decode after some chunks; each time a clip goes well afterwards."""
    net, computed = network(), []
    good = decoded(None, net, FAULTY)
    z, tiling = latent(FAULTY), TilingConfig(strips=FAULTY.strips)
    for taken in TAKEN:
        if ranks.rank == 0:
            counting = Faulty(net, not_a_number, 99)
            frames = decode_frames(counting, z, tiling, Compat(), "yuv420p", ranks=ranks)
            with closing(frames):
                for _ in range(taken):
                    next(frames)
            computed.append(99 - counting._left)
        else:
            decode_share(net, z, tiling, Compat(), "yuv420p", ranks=ranks)
        again = decoded(ranks, net, FAULTY)
        assert ranks.rank or same(again, good)
    return computed


def side_by_side(ranks: Ranks) -> object:
    """Let each rank wait at its second stage, in every frame, until all have come that far."""
    net = network()
    good = decoded(None, net, FAULTY)
    group = ranks.group("stage", tuple(range(ranks.size)))
    assert group is not None

    def meet(*arguments: object) -> None:
        everyone = torch.zeros(ranks.size)
        ranks.gather(group, everyone, torch.ones(1), "stage of a test").wait()

    hook = net.decoder.upsamples[1].register_forward_pre_hook(meet)
    together = decoded(ranks, net, FAULTY)
    hook.remove()
    return ranks.rank or same(together, good)


def lost(ranks: Ranks) -> object:
    """Lose the last rank in the middle of a clip."""

    def end(colours: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return colours

    net = network()
    decoded(ranks, Faulty(net, end, 2) if ranks.rank + 1 == ranks.size else net, FAULTY)
    return "nothing was noticed"


def different(ranks: Ranks) -> object:
    """Let the last rank divide the clip another way."""
    last = ranks.rank + 1 == ranks.size
    decoded(ranks, network(), FAULTY._replace(strips=5) if last else FAULTY)
    return "nothing was noticed"


def refused(ranks: Ranks) -> object:
    """Ask for what one rank alone can do; return what every rank says to it."""
    said = []
    for tiling in (
        TilingConfig(tiling="official", strips=2),
        TilingConfig(strips=2, order="tiles"),
    ):
        z = latent(Case(45, 23, 1, 2))
        try:
            if ranks.rank == 0:
                next(decode_frames(network(), z, tiling, Compat(), ranks=ranks))
            else:
                decode_share(network(), z, tiling, Compat(), ranks=ranks)
        except ValueError as error:
            said.append(str(error))
    return said


def tensors(ranks: Ranks) -> object:
    """Send tensors of every dtype and layout; then what is no tensor."""
    x = torch.arange(120.0).view(1, 2, 3, 4, 5)
    sent = [
        x.to(memory_format=torch.channels_last_3d),
        x[0].bfloat16().transpose(0, 3).contiguous().transpose(0, 3),
        torch.tensor([3.0], dtype=torch.float64),
        x.half().permute(4, 0, 1, 2, 3),
        None,
    ]
    if ranks.rank == 0:
        for number, one in enumerate(sent):
            for pending in send_tensor(ranks, one, (3, 1, number), 1, "rows"):
                pending.wait()
        header = torch.tensor([3, 1, 9, 1, 0, 3, 0, 0, 0, 0, 2, 0, 0, 0, 0])  # three, two apart
        ranks.send(header, 1, "size of rows").wait()
        try:
            return send_tensor(ranks, x[..., ::2], (3, 1, 9), 1, "rows")
        except ValueError as error:
            return str(error)
    told: list[object] = []
    for number, ours in enumerate(sent):
        announced = receive_mark(ranks, 0, "rows")
        assert announced.mark == (3, 1, number)
        y = receive_tensor(ranks, announced, 0, "rows")
        if ours is None or y is None:
            told.append(ours is y)
            continue
        equal = torch.equal(y, ours) and y.dtype == ours.dtype
        told.append(equal and y.stride() == ours.stride())
    try:
        receive_mark(ranks, 0, "rows")
    except ValueError as error:
        told.append(str(error))
    return told
