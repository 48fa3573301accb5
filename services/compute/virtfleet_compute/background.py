"""Owns the tasks that run beside the calls."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from virtfleet_service.errors import VirtfleetError

_log = logging.getLogger(__name__)


class Background:
    """Holds tasks while entered and cancels them at the end.

    A task that fails unexpectedly ends the process in good order: what it watches over is nobody's any more, and the
    next instance of the service begins with the truth.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending = False

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel all tasks and wait for them."""
        self._ending = True
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def create_task(self, work: Coroutine[Any, Any, Any], *, name: str) -> None:
        """Start a task."""
        if self._ending:
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, VirtfleetError):
            # A disk that is full, a driver that is broken: it will be looked at again.
            _log.error("the background task %r failed: %s", task.get_name(), error)
        elif error is not None:
            _log.critical("the background task %r failed unexpectedly", task.get_name(), exc_info=error)
            os.kill(os.getpid(), signal.SIGTERM)
