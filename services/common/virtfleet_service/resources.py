"""The head that every resource has, and its conditions."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from virtfleet.type.v1 import resource_pb2
from virtfleet_service import errors, names

ANNOTATIONS_LIMIT_BYTES = 64 * 1024
"""All keys and values of the annotations of one resource together."""


if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    Conditions = RepeatedCompositeFieldContainer[resource_pb2.Condition]


def create_head(resource: Message, name: str, *, call: object = None, uid: str | None = None) -> None:
    """Fill the head of a new resource in place: name, uid, generation 1, etag, times.

    Args:
        resource: The resource as the caller sent it. Its display_name, labels and annotations stay.
        name: Its full name.
        call: The call that makes it; kept for what heads may say of their maker.
        uid: Its identity; None: a new one.

    Raises:
        FieldOutOfRange: The annotations are too large.
    """
    del call
    check_annotations(resource)
    resource.name = name  # type: ignore[attr-defined]  # the head is the same in every resource
    resource.uid = uid or str(uuid.uuid4())  # type: ignore[attr-defined]  # of every head
    resource.generation = 1  # type: ignore[attr-defined]  # of every head
    resource.etag = etag_of(resource)  # type: ignore[attr-defined]  # of every head
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    # FromNanoseconds takes three times as long, and whole inventories are made.
    for stamp in (resource.create_time, resource.update_time):  # type: ignore[attr-defined]  # of every head
        stamp.seconds, stamp.nanos = seconds, nanoseconds


def uid_for(resource: Message) -> str:
    """Return the uid of a resource that is to be made: the one that the request gives it, or a new one.

    Raises:
        FieldOutOfRange: The request gives it something else than a UUID in lower case.
    """
    given: str = resource.uid  # type: ignore[attr-defined]  # the head is the same in every resource
    if given and not names.is_uid(given):
        raise errors.FieldOutOfRange(
            f"`{given}` is no uid: a UUID in lower case", field=f"{field_of(resource)}.uid", uid=given
        )
    return given or str(uuid.uuid4())


def touch(resource: Message) -> None:
    """Count a stored change of display_name, labels, annotations or spec: next generation, its etag, its time."""
    resource.generation += 1  # type: ignore[attr-defined]  # the head is the same in every resource
    resource.etag = etag_of(resource)  # type: ignore[attr-defined]  # of every head
    resource.update_time.FromNanoseconds(time.time_ns())  # type: ignore[attr-defined]  # of every head


def etag_of(resource: Message) -> str:
    """Return the etag: identity and generation, never the status."""
    return f"{resource.uid}.{resource.generation}"  # type: ignore[attr-defined]  # the head is the same everywhere


def check_preconditions(resource: Message, etag: str = "", expected_uid: str = "") -> None:
    """Hold a stored resource against what the caller believes it to be; an empty string is no belief.

    Raises:
        UidMismatch: The name is that of another resource now.
        EtagMismatch: The resource has changed since the caller read it.
    """
    name: str = resource.name  # type: ignore[attr-defined]  # the head is the same in every resource
    uid: str = resource.uid  # type: ignore[attr-defined]  # of every head
    current: str = resource.etag  # type: ignore[attr-defined]  # of every head
    if expected_uid and expected_uid != uid:
        raise errors.UidMismatch(
            f"{name} has the uid {uid} now, not {expected_uid}", resource=name, uid=uid, expected_uid=expected_uid
        )
    if etag and etag != current:
        raise errors.EtagMismatch(
            f"{name} has changed: its etag is {current}, not {etag}; read it again",
            resource=name,
            etag=current,
            expected_etag=etag,
        )


def check_absent(resource: Message) -> None:
    """Hold what the caller believes against a resource that an Update with `allow_missing` is about to create.

    Args:
        resource: The resource as the caller sent it.

    Raises:
        EtagMismatch: The caller has read one that is gone since: to make it again would undo somebody's deletion.
    """
    name: str = resource.name  # type: ignore[attr-defined]  # the head is the same in every resource
    etag: str = resource.etag  # type: ignore[attr-defined]  # of every head
    if etag:
        raise errors.EtagMismatch(
            f"{name} is gone: it had the etag {etag}; without an etag it is created anew",
            resource=name,
            etag="",
            expected_etag=etag,
        )


def field_of(resource: Message) -> str:
    """Return the name of the field that holds a resource in requests: `join_token` for a JoinToken."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", resource.DESCRIPTOR.name).lower()


def check_annotations(resource: Message) -> None:
    """Bound the annotations of a resource as a whole; single entries are bounded by the rules in the proto.

    Raises:
        FieldOutOfRange: They are too large.
    """
    annotations = getattr(resource, "annotations", None)
    if not annotations:
        return
    size = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    if size > ANNOTATIONS_LIMIT_BYTES:
        raise errors.FieldOutOfRange(
            f"the annotations have {size} bytes in all; at most {ANNOTATIONS_LIMIT_BYTES} are kept",
            field=f"{field_of(resource)}.annotations",
            size_bytes=size,
            limit_bytes=ANNOTATIONS_LIMIT_BYTES,
        )


def get_condition(conditions: Conditions, kind: str) -> resource_pb2.Condition | None:
    """Return the condition of a type; None if nothing is said about it."""
    return next((condition for condition in conditions if condition.type == kind), None)


def set_condition(
    conditions: Conditions, kind: str, *, holds: bool | None = True, reason: str = "", message: str = ""
) -> bool:
    """Say that a condition holds, does not, or is unknown (None); its transition time moves only when that changes.

    Returns:
        Whether anything is different from before.
    """
    wanted = {
        True: resource_pb2.CONDITION_STATUS_TRUE,
        False: resource_pb2.CONDITION_STATUS_FALSE,
        None: resource_pb2.CONDITION_STATUS_UNKNOWN,
    }[holds]
    found = get_condition(conditions, kind)
    if found is not None and (found.status, found.reason, found.message) == (wanted, reason, message):
        return False
    if found is None:
        found = conditions.add()
        found.type = kind
    if found.status != wanted:
        found.status = wanted
        found.last_transition_time.CopyFrom(now())
    found.reason, found.message = reason, message
    return True


def clear_condition(conditions: Conditions, kind: str) -> bool:
    """Say nothing about a condition any more; False if nothing was said."""
    for index, condition in enumerate(conditions):
        if condition.type == kind:
            del conditions[index]
            return True
    return False


def now() -> Timestamp:
    """Return the present time as a message."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns())
    return stamp
