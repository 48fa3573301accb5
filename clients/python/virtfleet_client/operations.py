"""What a finished operation says, alike for both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from virtfleet.type.v1 import operation_pb2
from virtfleet_client.errors import from_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.longrunning import operations_pb2
    from google.protobuf.message import Message

    Progress = Callable[[operation_pb2.OperationMetadata], None]

Result = TypeVar("Result", bound="Message")

WAIT_SECONDS = 20.0
"""How long one WaitOperation may hang: short enough that a proxy with a minute's patience never cuts it."""


GRACE_SECONDS = 10.0
"""How much longer a call of WaitOperation may take than what it asks for."""


def not_ended(operation: operations_pb2.Operation, timeout_seconds: float | None) -> TimeoutError:
    """Return the error of a wait whose time is over."""
    return TimeoutError(f"{operation.name} has not ended within {timeout_seconds} s; it goes on")


def metadata_of(operation: operations_pb2.Operation) -> operation_pb2.OperationMetadata:
    """Return the typed metadata of an operation; empty if it has none."""
    metadata = operation_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    return metadata


def result_of(operation: operations_pb2.Operation, kind: type[Result]) -> Result:
    """Return the response of a finished operation.

    Raises:
        VirtfleetError: The operation failed; the class is that of the reason.
        TypeError: The response is of another kind.
    """
    if operation.HasField("error"):
        raise from_status(operation.error)
    result = kind()
    if not operation.response.Unpack(result):
        message = f"{operation.name} answers {operation.response.type_url}, not {kind.DESCRIPTOR.full_name}"
        raise TypeError(message)
    return result
