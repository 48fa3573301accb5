"""The connection below a client, made anew when what it was made from has changed.

gRPC's Python channels keep the certificate and the address that they were made with. `Source` looks at the files, and
at the helper process of addresses that gRPC does not speak, and says when another channel is due. The channels here
ask it before each call; calls under way stay on the channel that they began on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import cached_property
from typing import Any, Final

import grpc
from google.rpc import code_pb2, status_pb2

from virtfleet_client.endpoint import Credentials, Endpoint
from virtfleet_client.errors import VirtfleetError, from_status

LOOK_SECONDS: Final = 1.0
"""How often the files are looked at, at most."""

_START_SECONDS: Final = 30.0
_SAID_BYTES: Final = 4096
_FUTURES: Final = 32


class ProxyError(OSError):
    """The helper process did not start, or has ended."""


class Proxy:
    """Is the helper process `virtfleet proxy URI`, which gives a unix socket for any transport."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._program = os.environ.get("VIRTFLEET_COMMAND") or "virtfleet"
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._socket = ""
        self._said = bytearray()

    def last_words(self) -> str:
        """Return the last two lines that it has said of what goes wrong; of what goes well it says nothing."""
        lines = [line.strip() for line in bytes(self._said).decode(errors="replace").split("\n") if line.strip()]
        return "; ".join(dict.fromkeys(lines[-2:]))

    def socket(self) -> str:
        """Return the path of its socket; starts the process first where it does not run.

        Raises:
            ProxyError: It does not start.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        return self._socket

    def _start(self) -> None:
        what = f"{self._program} proxy {self._uri}"
        try:
            process = subprocess.Popen(
                [self._program, "proxy", self._uri],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            message = f"{what}: {error}"
            raise ProxyError(message) from error
        lines: queue.Queue[bytes] = queue.Queue()
        output, errors = process.stdout, process.stderr
        if output is None or errors is None:
            raise ProxyError(what)
        said = self._said = bytearray()

        def read() -> None:
            with output:
                lines.put(output.readline())
                while output.read(_SAID_BYTES):
                    pass

        def listen() -> None:
            with errors:
                while text := errors.read1(_SAID_BYTES):  # type: ignore[attr-defined]  # a buffered pipe has it
                    said.extend(text)
                    del said[:-_SAID_BYTES]

        self._readers = [threading.Thread(target=work, daemon=True) for work in (read, listen)]
        for reader in self._readers:
            reader.start()
        try:
            line = lines.get(timeout=_START_SECONDS).decode(errors="replace").strip()
        except queue.Empty:
            line = ""
        if not line.startswith("/"):
            process.kill()
            process.wait()
            message = f"{what}: {said.decode(errors='replace').strip() or 'it said no socket'}"
            raise ProxyError(message)
        self._process, self._socket = process, line

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(1)


class Source:
    """Says what channels are made from, and when it has changed.

    Args:
        endpoint: The address.
        credentials: For mutual TLS.

    Raises:
        ValueError: The address demands mutual TLS and there are no credentials.
    """

    def __init__(self, endpoint: Endpoint, credentials: Credentials | None) -> None:
        if endpoint.secure and credentials is None:
            message = f"{endpoint.target} demands mutual TLS: give credentials"
            raise ValueError(message)
        self.endpoint = endpoint
        self._credentials = credentials if endpoint.secure else None
        self._proxy = Proxy(endpoint.proxied) if endpoint.proxied else None
        self._looked = 0.0
        self._stamps: tuple[object, ...] = ()
        self._made: tuple[str, grpc.ChannelCredentials | None] | None = None
        self._lock = threading.Lock()

    def made_from(self) -> tuple[str, grpc.ChannelCredentials | None]:
        """Return target and credentials; another object than last time if either has changed.

        Raises:
            OSError: A file cannot be read, or the helper does not start, and there is nothing from before.
            ValueError: Certificate and key do not fit, and there is nothing from before.
        """
        with self._lock:
            now = time.monotonic()
            if self._made is not None and now - self._looked < LOOK_SECONDS:
                return self._made
            self._looked = now
            try:
                self._look()
            except (OSError, ValueError):
                # While files are being replaced they may not fit together: what was good stays in use.
                if self._made is None:
                    raise
            if self._made is None:
                raise RuntimeError("a look makes it")
            return self._made

    def _look(self) -> None:
        target = self.endpoint.target
        if self._proxy is not None:
            target = f"unix:{self._proxy.socket()}"
        stamps: tuple[object, ...] = (target,)
        if self._credentials is not None:
            stamps += self._credentials.stamps()
        if self._made is None or stamps != self._stamps:
            credentials = self._credentials.for_channel() if self._credentials is not None else None
            self._made, self._stamps = (target, credentials), stamps

    def explained(self, error: VirtfleetError) -> VirtfleetError:
        """Add to an error of the connection what the helper says of it: gRPC sees a closed socket only."""
        said = self._proxy.last_words() if self._proxy is not None else ""
        if not said or error.reason or error.code() is not grpc.StatusCode.UNAVAILABLE:
            return error
        return from_status(status_pb2.Status(code=code_pb2.UNAVAILABLE, message=f"{error.details()}: {said}"))

    def close(self) -> None:
        """End the helper process."""
        if self._proxy is not None:
            self._proxy.close()


class Switch:
    """Holds the channel that new calls begin on.

    Args:
        source: Says when another one is due.
        make: Makes a channel.
        retire: Is given one that new calls no longer begin on.
    """

    def __init__(
        self,
        source: Source,
        make: Callable[[str, grpc.ChannelCredentials | None], Any],
        retire: Callable[[Any], None],
    ) -> None:
        self._source = source
        self._make = make
        self._retire = retire
        self._made_from: object = None
        self._channel: Any = None
        self._lock = threading.Lock()

    @cached_property
    def executor(self) -> futures.Executor:
        """Runs the calls that nobody waits for."""
        return futures.ThreadPoolExecutor(_FUTURES, thread_name_prefix="virtfleet calls")

    def channel(self) -> Any:  # noqa: ANN401  # the two channel classes share no base
        """Return the channel for a call that begins now."""
        made_from = self._source.made_from()
        with self._lock:
            if made_from is not self._made_from:
                old, self._channel = self._channel, self._make(*made_from)
                self._made_from = made_from
                if old is not None:
                    self._retire(old)
            return self._channel

    def starter(self, kind: str, *arguments: Any, **keywords: Any) -> Starter:  # noqa: ANN401  # what gRPC's stubs pass
        """Return what starts calls of a method, each on the channel of its moment."""
        return Starter(self, kind, arguments, keywords)


class Starter:
    """Starts calls of one method: a multi-callable as gRPC's stubs expect it."""

    def __init__(self, switch: Switch, kind: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._switch = switch
        self._kind = kind
        self._arguments = arguments
        self._keywords = keywords
        self._channel: Any = None
        self._callable: Any = None

    def _now(self) -> Any:  # noqa: ANN401  # one of gRPC's multi-callables
        channel = self._switch.channel()
        if channel is not self._channel:
            self._callable = getattr(channel, self._kind)(*self._arguments, **self._keywords)
            self._channel = channel
        return self._callable

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  # as gRPC's
        """Start a call."""
        return self._now()(*arguments, **keywords)

    def with_call(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  # as gRPC's
        """Call, and return the answer and the call."""
        return self._now().with_call(*arguments, **keywords)

    def future(self, *arguments: Any, **keywords: Any) -> futures.Future[Any]:  # noqa: ANN401  # as gRPC's
        """Start a call without waiting for it; repetitions happen behind the future too."""
        return self._switch.executor.submit(self, *arguments, **keywords)
