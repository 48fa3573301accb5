"""Where a watch stands, so that it can go on after any break."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from virtfleet.type.v1 import watch_pb2
from virtfleet_client import calls


def _service_and_method(request: Message) -> tuple[str, str]:
    package = request.DESCRIPTOR.file.package
    method = request.DESCRIPTOR.name.removesuffix("Request")
    return (f"{package}.OperationService" if method == "WatchOperations" else f"{package}.WatchService"), method


def watch_path(request: Message) -> str:
    """Return the gRPC path of the watch that takes `request`.

    Raises:
        KeyError: No watch takes it.
    """
    service, method = _service_and_method(request)
    return f"/{service}/{method}"


class Resumption:
    """Keeps the request with which a watch goes on.

    Args:
        request: The first request; it is copied.

    Attributes:
        request: The request for the next stream.
        response_class: The class of the answers.
    """

    def __init__(self, request: Message) -> None:
        service, method = _service_and_method(request)
        descriptor = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method]
        self.response_class: Any = message_factory.GetMessageClass(descriptor.output_type)
        self.request: Any = type(request).FromString(request.SerializeToString())
        self._in_snapshot: bool = self.request.WhichOneof("start") != "resume_token"
        self._failures = 0

    def note(self, answer: Any) -> None:  # noqa: ANN401  # one of the response classes
        """Take the token of an answer, except inside a snapshot: a broken snapshot begins again."""
        self._failures = 0
        if answer.WhichOneof("marker") == "snapshot_end":
            self._in_snapshot = False
        if answer.resume_token and not self._in_snapshot:
            self.request.resume_token = answer.resume_token

    def forget(self) -> None:
        """Begin the next stream with a snapshot."""
        self.request.snapshot.CopyFrom(watch_pb2.WatchSnapshot())
        self._in_snapshot = True

    @property
    def in_snapshot(self) -> bool:
        """Whether the next stream begins with a snapshot."""
        return self._in_snapshot

    def delay_seconds(self) -> float:
        """Return how long to wait before the next stream: nothing after one with answers, else a rising back-off."""
        self._failures += 1
        return 0.0 if self._failures == 1 else calls.delay_seconds(self._failures - 1, None)
