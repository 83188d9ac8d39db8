# SPDX-License-Identifier: Apache-2.0
"""A worker of a fleet: makes batches of clips in processes that stay, and tells how it goes.

A plain class without Ray, which runs it in an actor. Its methods return at once or within seconds:
a batch is made in a thread, or by a group of ranks, so that the driver always gets an answer.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pw_runtime.errors import BadRequest, BadWeights, PixelWizardError
from pw_runtime.fleet.batch import found_here, make_batch
from pw_runtime.fleet.group import Group
from pw_runtime.fleet.messages import PIECE_BYTES, Event, Joined, Order, Part, Said
from pw_runtime.system.atomic_files import partial_name, remove, stale_partials
from pw_runtime.system.packages import require_packages
from pw_runtime.types import LoraFile, Request, RunOptions, StageName

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.planning.warm_networks import WarmNetworks

NO_LORAS: Final[
    Mapping[StageName, tuple[LoraFile, ...]]
] = {}  # messages take a copy, which a proxy has none of
LOCAL_STAGING = "pw-fleet"  # in the folder for temporary files, where the output is not shared


class Worker:
    """Makes clips for a driver on another machine.

    The driver calls `versions`, `join`, then for every batch `start`, `events` until there is an
    Ended, and `read` for what it cannot see.
    """

    def __init__(self, name: str, processes: int = 1) -> None:
        """Take a name, and how many processes make each clip; nothing is opened yet."""
        # As the command line does, and for its reason: threads that wait must not spin.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._name, self._processes = name, processes
        self._bundle: Bundle | None = None
        self._warm: WarmNetworks | None = None  # where this process makes the clips alone
        self._group: Group | None = None  # that makes them otherwise
        self._root: Path | None = None  # of the folders of all batches
        self._shared = False
        self._batches = 0
        self._folder: Path | None = None  # of the batch
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def versions(self) -> dict[str, str]:
        """Return the versions of what takes part in a run, and the host's name."""
        from pw_runtime.job.receipt import versions

        return {**versions(), "host": socket.gethostname()}

    def join(
        self,
        model: str,
        digest: str,
        options: RunOptions,
        staging: str,
        token: str,
        loras: Mapping[StageName, tuple[LoraFile, ...]] = NO_LORAS,
    ) -> Joined:
        """Open the bundle and find out what is here.

        Args:
            model: folder of the bundle, as the driver names it.
            digest: of the driver's weights: its bundle and LoRAs.
            options: of the run.
            staging: folder of the driver, in which a worker that sees it makes its own.
            token: content of the file `token` there.
            loras: by network, under the paths that they have on every machine.

        Raises:
            BadRequest: this machine cannot take part, with the reason and the remedy.
        """
        from pw_runtime.job.checks import pick_device
        from pw_runtime.job.conv_choice import settle_conv
        from pw_runtime.planning.warm_networks import WarmNetworks
        from pw_runtime.system.machine import available_memory_bytes

        with self._named():
            require_packages("a worker of a fleet", "tokenizers", "av")
            self._bundle = self._open(model, digest, loras)
            device = pick_device(options.device)
            settle_conv(options, self._say)  # the driver chose one, which must run here
            self._root, self._shared = self._staging(Path(staging), token)
            if self._processes > 1:
                self._group = Group(self._processes, self._events.put)
                found = self._group.join(Part(model=model, loras=loras, options=options))
            else:
                self._warm = WarmNetworks()
                found = (found_here(device),)
        free = [rank.gpu_bytes for rank in found if rank.gpu_bytes is not None]
        return Joined(
            host=socket.gethostname(),
            shares_output=self._shared,
            machine=found[0].machine,
            host_bytes=available_memory_bytes(),
            process_bytes=sum(rank.process_bytes for rank in found),
            gpu_bytes=min(free, default=None),
        )

    def start(self, request: Request) -> str:
        """Begin to make the clips of a request, whose `out` is that of the driver.

        Return the folder that they are made in.
        """
        assert self._bundle is not None, "a worker joins before it starts"
        assert self._root is not None
        if self._folder is not None:  # of the batch before: all of it is published or given up
            shutil.rmtree(self._folder, ignore_errors=True)
        self._batches += 1
        folder = self._folder = self._root / str(self._batches)
        folder.mkdir(parents=True)
        own = replace(request, out=folder, overwrite=False, fresh=False)
        order = Order(request=own, out=request.out, shared=self._shared)
        if self._group is None:
            threading.Thread(target=self._make, args=(order, self._bundle), daemon=True).start()
        else:
            self._group.start(order)
        return str(folder)

    def events(self, seconds: float) -> list[Event]:
        """Return what has happened since the last call; wait for the first event up to a time."""
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=seconds))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def read(self, name: str, offset: int) -> bytes:
        """Return the next piece of a staged file, at most PIECE_BYTES long."""
        assert self._folder is not None, "no batch was started"
        with (self._folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)

    def leave(self) -> None:
        """End the ranks, and remove what is left of the batches, if there were any."""
        if self._group is not None:
            self._group.end()
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    def _say(self, text: str) -> None:
        self._events.put(Said(text))

    def _make(self, order: Order, bundle: Bundle) -> None:
        """Make a batch in this process."""
        self._events.put(make_batch(order, bundle, self._events.put, warm=self._warm))

    def _open(
        self, model: str, digest: str, loras: Mapping[StageName, tuple[LoraFile, ...]]
    ) -> Bundle:
        from pw_runtime.checkpoint.bundle import open_bundle
        from pw_runtime.checkpoint.lora import with_loras

        try:
            bundle = open_bundle(model)
        except BadWeights as error:
            raise BadRequest(
                f"the bundle {model} cannot be seen",
                got=f"{error.what}: {error.got}",
                wanted=f"the same bundle under the same path on every machine, {digest[:12]}...",
                do="mount the folder that holds it there, or copy it there",
            ) from error
        if not digest.startswith(bundle.digest):
            raise BadRequest(
                f"the bundle {model} is another one than the driver's",
                got=f"bundle.json with SHA-256 {bundle.digest[:12]}...",
                wanted=f"{digest[:12]}...",
                do="copy the driver's bundle there, or give --model a path that is shared",
            )
        bundle = with_loras(bundle, loras)
        if bundle.weights_digest != digest:
            raise BadRequest(
                "a LoRA is another one than the driver's",
                got=f"SHA-256 {bundle.weights_digest}",
                wanted=f"SHA-256 {digest}",
                do="copy the driver's files there, or give --lora paths that are shared",
            )
        return bundle

    def _staging(self, staging: Path, token: str) -> tuple[Path, bool]:
        """Return the folder for this worker's batches, and whether the driver sees it."""
        try:
            seen = (staging / "token").read_text(encoding="utf-8") == token
        except OSError:
            seen = False
        if not seen:
            own = Path(tempfile.gettempdir()) / f"{LOCAL_STAGING}-{socket.gethostname()}"
            for leftover in stale_partials(own):  # of workers that were killed
                remove(leftover)
            return partial_name(own), False
        root = staging / self._name
        try:
            root.mkdir(exist_ok=True)
        except OSError as error:
            raise BadRequest(
                f"the output folder {staging.parent} can be seen and not written",
                got=error.strerror,
                do="mount it with the right to write, or choose an --out that is not shared: clips "
                "are then sent to the driver",
            ) from error
        return root, True

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the worker and its machine in errors."""
        try:
            yield
        except PixelWizardError as error:
            text = f"worker {self._name} on {socket.gethostname()}: {error}"
            raise BadRequest(text) from error
