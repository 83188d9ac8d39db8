# SPDX-License-Identifier: Apache-2.0
"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pw_runtime.errors import BadRequest
from pw_runtime.server.app import make_app
from pw_runtime.server.guard import Guard
from pw_runtime.server.settings import Settings, check_settings, with_host_memory
from pw_runtime.server.store import Store
from pw_runtime.server.supervisor import Supervisor
from pw_runtime.system.folder_lock import locked_folder

QUEUE = "queue.sqlite"


def serve(settings: Settings, say: Callable[[str], None]) -> int | None:
    """Serve until a signal asks for the end; return its number.

    Raises BadRequest: settings, folder or address cannot be used, or no worker can work.
    """
    check_settings(settings)
    os.umask(0o077)
    _make_root(settings)
    with locked_folder(settings.root):
        store = Store(settings.root / QUEUE)
        try:
            return _Server(with_host_memory(settings), store, say).run_until_signal()
        finally:
            store.close()


def _make_root(settings: Settings) -> None:
    """Make the folder, for its owner alone. Raises BadRequest."""
    try:
        (settings.root / "jobs").mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.root.chmod(0o700)
    except OSError as error:
        raise BadRequest(
            f"cannot use the folder {settings.root}",
            got=error.strerror,
            do="choose another --root, which is yours",
        ) from error


class _Server(uvicorn.Server):
    """uvicorn, whose streams and workers end at the first signal."""

    def __init__(self, settings: Settings, store: Store, say: Callable[[str], None]) -> None:
        self._supervisor = Supervisor(settings, store, say)
        self._settings, self._say = settings, say
        self._signal: int | None = None
        app = make_app(settings, store, self._supervisor, self._living)
        super().__init__(
            uvicorn.Config(
                Guard(app, settings),
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
                lifespan="on",
                loop="asyncio",
                ws="none",
            )
        )

    def run_until_signal(self) -> int | None:
        """Serve; return the number of the signal that ended it. Raises BadRequest."""
        hang_up = signal.getsignal(signal.SIGHUP)
        with _listening(self._settings) as listener:
            name, port = listener.getsockname()[:2]
            self._say(f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}")
            if hang_up is not signal.SIG_IGN:  # as with nohup
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                asyncio.run(self.serve([listener]))
            finally:
                signal.signal(signal.SIGHUP, hang_up)
        if self._supervisor.failure is not None:
            raise BadRequest(self._supervisor.failure)
        return self._signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; end all streams, which uvicorn would wait for."""
        if self._signal is None:
            self._signal = sig
        self._supervisor.hub.close()
        if sig == signal.SIGINT and self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @asynccontextmanager
    async def _living(self, app: FastAPI) -> AsyncIterator[None]:
        await self._supervisor.start()
        watching = asyncio.create_task(self._tell_presets())
        try:
            yield
        finally:
            watching.cancel()
            await self._supervisor.stop()

    async def _tell_presets(self) -> None:
        """Tell which presets fit, and when that changes, or end where no worker can work."""
        supervisor, told = self._supervisor, dict[str, bool]()
        await supervisor.first_word.wait()
        if supervisor.failure is not None:
            self.should_exit = True
            return
        able = self._newly_able(told)
        if unknown := [name for name in self._settings.presets if name not in told]:
            self._say(f"not known until every device is ready: {', '.join(unknown)}")
        self._say(f"ready for jobs: {', '.join(able) or 'none'}")
        while True:
            supervisor.changed.clear()
            await supervisor.changed.wait()
            if able := self._newly_able(told):
                self._say(f"now also ready for jobs: {', '.join(able)}")

    def _newly_able(self, told: dict[str, bool]) -> list[str]:
        """Say which presets do not fit, and return those that do, where `told` has it not so."""
        fits = self._supervisor.fits
        news = {name: fit for name, fit in fits.items() if told.get(name) is not fit.fits}
        for name, fit in news.items():
            told[name] = fit.fits
            if not fit.fits:
                self._say(f"preset {name} does not fit: {fit.reason}")
        return [name for name, fit in news.items() if fit.fits]


def _listening(settings: Settings) -> socket.socket:
    """Return a socket that listens. Raises BadRequest."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise BadRequest(
            f"cannot listen on {settings.host}, port {settings.port}",
            got=getattr(error, "strerror", None) or error,
            do="choose another --port or --host",
        ) from error
