"""The one thread: epoll, timers and signals."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import signal
import time
import traceback
from collections.abc import Callable

from virtfleet_launcher import report

__all__ = ["Loop", "Timer"]

Handler = Callable[[int], None]

_REST_SECONDS = 1.0


class Timer:
    """A call in the future; `cancel` is enough to be rid of it."""

    def __init__(self, call: Callable[[], None]) -> None:
        """Hold the call until it is due."""
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Forget the call; harmless when it was made already."""
        self.call = None


class Loop:
    """Calls a handler for each descriptor that is ready, and never ends because one of them failed."""

    def __init__(self) -> None:
        """Make an empty loop that SIGTERM and SIGINT stop."""
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: list[Callable[[], None]] = []
        self._running = True
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self.add(self._wake_read, select.EPOLLIN, self._woken)

    def _stop(self, _signal: int, _frame: object) -> None:
        self._running = False

    def _woken(self, _events: int) -> None:
        os.read(self._wake_read, 512)

    def add(self, descriptor: int, events: int, handler: Handler) -> None:
        """Call the handler with the ready events from now on."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, events: int) -> None:
        """Change the events that are waited for."""
        self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        """Stop watching; to be called before the descriptor is closed. Harmless when it is not watched."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Make a call after some time."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def soon(self, call: Callable[[], None]) -> None:
        """Make a call when all that is ready now was handled: one answer for a batch."""
        self._soon.append(call)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        while self._running:
            for descriptor, events in self._epoll.poll(self._patience()):
                handler = self._handlers.get(descriptor)
                # Absent: an earlier handler of this round closed it.
                if handler is not None and not self._guard(handler, events):
                    self._rest(descriptor, handler)
            while self._timers and self._timers[0][0] <= time.monotonic():
                timer = heapq.heappop(self._timers)[2]
                if timer.call is not None:
                    self._guard(timer.call)
            soon, self._soon = self._soon, []
            for call in soon:
                self._guard(call)

    def _patience(self) -> float | None:
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        if self._soon:
            return 0
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _rest(self, descriptor: int, handler: Handler) -> None:
        """Leave a descriptor alone for a second: it is still ready, and its handler would fail without end."""
        if self._handlers.get(descriptor) is handler:
            self.remove(descriptor)
            self.later(_REST_SECONDS, lambda: self.add(descriptor, select.EPOLLIN, handler))

    def _guard(self, call: Callable[..., None], *arguments: int) -> bool:
        try:
            call(*arguments)
        except Exception as failure:  # noqa: BLE001 - the boundary: no failed handler may end the parent of all guests
            report.error("a handler failed", trace="".join(traceback.format_exception(failure)))
            return False
        return True
