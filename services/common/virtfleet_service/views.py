"""How much of a resource an answer carries."""

from __future__ import annotations

from typing import Final, TypeVar

from google.protobuf.message import Message

from virtfleet.type.v1 import resource_pb2

M = TypeVar("M", bound=Message)

BASIC: Final = resource_pb2.RESOURCE_VIEW_BASIC
FULL: Final = resource_pb2.RESOURCE_VIEW_FULL

_LEFT_OUT_OF_STATUS = ("active_spec", "resolved_spec")


def apply_view(message: M, view: int) -> M:
    """Return the resource as a view shows it: the message itself for FULL and UNSPECIFIED, a copy for BASIC.

    BASIC is the head and the status without `active_spec` and `resolved_spec`.
    """
    if view != BASIC:
        return message
    seen = type(message)()
    seen.CopyFrom(message)
    fields = seen.DESCRIPTOR.fields_by_name
    if "spec" in fields:
        seen.ClearField("spec")
    if "status" in fields and seen.HasField("status"):
        status = seen.status  # type: ignore[attr-defined]  # asked for above
        for name in _LEFT_OUT_OF_STATUS:
            if name in status.DESCRIPTOR.fields_by_name:
                status.ClearField(name)
    return seen
