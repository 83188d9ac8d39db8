# SPDX-License-Identifier: Apache-2.0
"""A batch in the process that makes it, a worker or the first of its ranks: clips become events."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pw_runtime.errors import BadRequest, BadWeights, MissingPackage, PixelWizardError, RankFailed
from pw_runtime.fleet.messages import (
    Ended,
    Event,
    Failed,
    Found,
    Kept,
    Made,
    Order,
    Said,
    StagedFile,
    Warned,
)
from pw_runtime.system.progress import Reporter

if TYPE_CHECKING:
    import torch

    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.planning.warm_networks import WarmNetworks
    from pw_runtime.system.ranks import Ranks


def found_here(device: torch.device) -> Found:
    """Describe this process, which will compute on a device."""
    from pw_runtime.job.receipt import machine
    from pw_runtime.system.machine import rss_bytes

    gpu_bytes = None
    if device.type == "cuda":
        import torch

        gpu_bytes = int(torch.cuda.mem_get_info(device)[0])
    return Found(machine=machine(device), process_bytes=rss_bytes(), gpu_bytes=gpu_bytes)


def make_batch(
    order: Order,
    bundle: Bundle,
    put: Callable[[Event], None],
    *,
    ranks: Ranks | None = None,
    warm: WarmNetworks | None = None,
) -> Ended:
    """Run the pipeline over a batch; return its ending, whatever that is.

    Args:
        order: the batch.
        bundle: the converted checkpoint.
        put: takes every event before the end.
        ranks: that make each clip together, of which this process is the first; None: it alone.
        warm: networks that stay loaded in a process that makes clips alone.
    """
    batch = _Batch(order, put)
    try:
        return batch.made(bundle, ranks, warm)
    except BaseException:  # whatever it is, the driver must hear of it
        return Ended(traceback.format_exc(), lost=ranks is not None)


class _Batch:
    """Events of a batch and how they arise."""

    def __init__(self, order: Order, put: Callable[[Event], None]) -> None:
        self._order, self._put = order, put

    def made(self, bundle: Bundle, ranks: Ranks | None, warm: WarmNetworks | None) -> Ended:
        """Run the pipeline. Raises what nobody foresaw."""
        from pw_engines import EngineError, StoreError
        from pw_runtime.pipeline import generate

        request = self._order.request
        reporter = _EventReporter(self._put, self._tell_of_clip, request.out, self._order.out)
        try:
            outcomes = generate(request, bundle, reporter, ranks, warm=warm)
        except (PixelWizardError, EngineError, StoreError) as error:
            self._tell_of_latents()
            bad_input = isinstance(error, BadRequest | BadWeights | MissingPackage)
            text = error.what if isinstance(error, RankFailed) else str(error)
            return Ended(text, bad_input, lost=ranks is not None and not bad_input)
        for outcome in outcomes:
            if outcome.error is not None:
                self._put(Failed(outcome.prompt.id, outcome.error))
        self._tell_of_latents()
        return Ended()

    def _tell_of_clip(self, video: Path) -> None:
        """Tell that a video and its receipt are complete."""
        files = (video.with_name(f"{video.stem}.json"), video)
        self._put(Made(video.stem, tuple(self._staged(path) for path in files)))

    def _tell_of_latents(self) -> None:
        """Tell which latents are there."""
        from pw_runtime.job.latents import SUFFIX

        kept = sorted(self._order.request.out.glob(f"*{SUFFIX}"))
        if kept:
            self._put(Kept(tuple(self._staged(path) for path in kept)))

    def _staged(self, path: Path) -> StagedFile:
        from pw_runtime.checkpoint.bundle import sha256_of

        digest = "" if self._order.shared else sha256_of(path)
        return StagedFile(name=path.name, bytes=path.stat().st_size, sha256=digest)


class _EventReporter(Reporter):
    """Turns what a run reports into events.

    Names of files are those that they get in the driver's output folder.
    """

    def __init__(
        self,
        put: Callable[[Event], None],
        announce: Callable[[Path], None],
        folder: Path,
        out: Path,
    ) -> None:
        """Put events; `announce` a finished video in `folder`, which becomes one in `out`."""
        super().__init__(quiet=True)
        self._put, self._announce = put, announce
        self._folder, self._out = str(folder), str(out)

    def say(self, text: str) -> None:
        """Tell a line."""
        self._put(Said(text.replace(self._folder, self._out)))

    def warn(self, text: str) -> None:
        """Tell a line that the user must see."""
        self._put(Warned(text.replace(self._folder, self._out)))

    def finished(self, path: Path) -> None:
        """Announce a complete clip."""
        self._announce(path)
