"""One thread with one netlink socket.

What the kernel does for us may take 20 ms, and the event loop never waits for it.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from virtfleet_service.errors import BackendFailed

if TYPE_CHECKING:
    # Not at run time: the import costs 16 MiB and 0.2 s, which a service without networks does not pay.
    from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it has no types

__all__ = ["NetlinkThread"]

P = ParamSpec("P")
T = TypeVar("T")


class NetlinkThread:
    """Runs functions that get an `IPRoute`, one after the other, in a thread of its own.

    A function once begun runs to its end, also when its caller is cancelled; what is called next comes after it.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"netlink-{name}")
        self._socket: IPRoute | None = None

    def call(
        self, function: Callable[Concatenate[IPRoute, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """Run a function in the thread.

        Raises:
            BackendFailed: The kernel refused; metadata `errno`.
        """
        return self._call(lambda: function(self._open(), *args, **kwargs))

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._translated, work)

    def _translated(self, work: Callable[[], T]) -> T:
        from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]  # it has no types

        try:
            return work()
        except NetlinkError as error:
            code = abs(int(error.code))
            raise BackendFailed(
                f"the kernel refused a change of the network: {os.strerror(code)}",
                errno=errno.errorcode.get(code, code),
            ) from error
        except OSError as error:
            raise BackendFailed(
                f"the kernel refused a change of the network: {error.strerror} ({error.filename or 'no file'})",
                errno=errno.errorcode.get(error.errno or 0, error.errno),
            ) from error

    def _open(self) -> IPRoute:
        if self._socket is None:
            from pyroute2 import IPRoute

            self._socket = IPRoute()
        return self._socket

    async def close(self) -> None:
        """End the thread after what was begun; may be repeated."""

        def close() -> None:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

        await asyncio.get_running_loop().run_in_executor(self._executor, close)
        self._executor.shutdown(wait=False)
