"""request_id: a repeated call has no second effect and gets the first one's answer.

The key is (subject, method, request_id). Requests are compared by meaning: without request_id and inline_wait,
encoded again with maps in a fixed order. The answer is stored in the transaction of the effect. Final answers only:
a remembered RESOURCE_EXHAUSTED would make every retry useless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf import any_pb2, symbol_database
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from virtfleet_service import errors, failpoints
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    import sqlite3

    from virtfleet_service.call import Call
    from virtfleet_service.store import Store

_OPERATION: Final = "operation"
_RESPONSE: Final = "response"
_ERROR: Final = "error"

# They steer the call, not what it asks for.
_NOT_COMPARED = ("request_id", "inline_wait")

M = TypeVar("M", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Names one intended effect of one caller.

    Attributes:
        subject: Who asks; the ids of others mean nothing to him.
        method: The full name of the method.
        request_id: As the caller chose it.
        digest: Stands for what the request means.
    """

    subject: str
    method: str
    request_id: str
    digest: bytes

    def encode(self) -> str:
        """Return it as text, to be kept beside an effect that a crash may cut from its answer."""
        return json.dumps([self.subject, self.method, self.request_id, self.digest.hex()])

    @classmethod
    def decode(cls, text: str) -> RequestKey:
        """Read it."""
        subject, method, request_id, digest = json.loads(text)
        return cls(subject, method, request_id, bytes.fromhex(digest))


@dataclass(frozen=True, slots=True)
class Answer:
    """Is a remembered answer: the name of an operation, or a response."""

    operation: str = ""
    response: any_pb2.Any | None = None


def method_name(call: Call) -> str:
    """Return the full name of the called method: `virtfleet.compute.v1.DomainService.StartDomain`."""
    return call.method.full_name.lstrip("/").replace("/", ".")


def key_of(call: Call, request: Message) -> RequestKey | None:
    """Return the key of a request; None if it carries no request_id, or asks for a plan: none is ever remembered."""
    request_id: str = getattr(request, "request_id", "")
    if not request_id or getattr(request, "validate_only", False):
        return None
    return RequestKey(call.caller.subject, method_name(call), request_id, digest_of(request))


def digest_of(request: Message) -> bytes:
    """Return a digest of what a request means; equal for any order of maps and fields on the wire."""
    compared = type(request)()
    compared.CopyFrom(request)
    for name in _NOT_COMPARED:
        if name in compared.DESCRIPTOR.fields_by_name:
            compared.ClearField(name)
    return hashlib.sha256(compared.SerializeToString(deterministic=True)).digest()


def recall(connection: sqlite3.Connection, key: RequestKey) -> Answer | None:
    """Return the remembered answer to a request; None if it is new.

    Args:
        connection: That of a transaction, or one that reads what is on the disk.
        key: Names the request.

    Raises:
        RequestIdReused: The same caller has used the id for another request.
        VirtfleetError: The remembered answer is this error.
    """
    found = connection.execute(
        "SELECT digest, sort, answer FROM requests WHERE subject = ? AND method = ? AND request_id = ?",
        (key.subject, key.method, key.request_id),
    ).fetchone()
    if found is None:
        return None
    digest, sort, answer = found
    if digest != key.digest:
        raise errors.RequestIdReused(
            f"request_id {key.request_id} was used for another request of {key.method}: take a new one",
            field="request_id",
            request_id=key.request_id,
            method=key.method,
        )
    if sort == _ERROR:
        raise error_of(status_pb2.Status.FromString(answer))
    if sort == _OPERATION:
        return Answer(operation=bytes(answer).decode())
    return Answer(response=any_pb2.Any.FromString(answer))


def remember_operation(tx: Transaction, key: RequestKey, name: str) -> None:
    """Remember that an operation is the answer."""
    _remember(tx, key, _OPERATION, name.encode())


def remember_response(tx: Transaction, key: RequestKey, response: Message) -> None:
    """Remember a response."""
    packed = any_pb2.Any()
    packed.Pack(response)
    _remember(tx, key, _RESPONSE, packed.SerializeToString())


def guarded(
    tx: Transaction, key: RequestKey | None, work: Callable[[Transaction], T]
) -> tuple[T | None, errors.VirtfleetError | None]:
    """Run the work of a call; a final error undoes it and is remembered in the same transaction.

    Returns:
        The result and None, or None and the error, which the caller raises after the commit.

    Raises:
        VirtfleetError: One that is not final, or there is no request_id: all is undone, nothing remembered.
    """
    if key is None:
        return work(tx), None
    try:
        return tx.attempt(work), None
    except errors.VirtfleetError as error:
        if not error.final:
            raise
        _remember(tx, key, _ERROR, error.to_status().SerializeToString())
        return None, error


async def once(store: Store, call: Call, request: Message, work: Callable[[Transaction], M]) -> M:
    """Do a unary mutation of records once per request_id; returns after the commit.

    Args:
        store: Where it is recorded.
        call: The call.
        request: Its request; without a request_id the work is simply done.
        work: The effect, in one transaction; returns the response.

    Raises:
        RequestIdReused: The id belongs to another request of the same caller.
        VirtfleetError: What the work raised, now or the first time.
    """
    key = key_of(call, request)

    def run(tx: Transaction) -> tuple[M | None, errors.VirtfleetError | None]:
        if key is None:
            return work(tx), None
        answer = recall(tx.connection, key)
        if answer is not None:
            return _unpack(answer), None
        response, error = guarded(tx, key, work)
        if response is not None:
            remember_response(tx, key, response)
        return response, error

    response, error = await store.write(run)
    failpoints.reach("requests.recorded")
    if error is not None:
        raise error
    assert response is not None  # noqa: S101  # one of the two is set
    return response


def error_of(status: status_pb2.Status) -> errors.VirtfleetError:
    """Make the error again that was stored as a status."""
    information = error_details_pb2.ErrorInfo()
    violations: list[tuple[str, str]] = []
    retry_delay_seconds: float | None = None
    for detail in status.details:
        bad, failure, retry = (
            error_details_pb2.BadRequest(),
            error_details_pb2.PreconditionFailure(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(information):
            continue
        if detail.Unpack(bad):
            violations = [(violation.field, violation.description) for violation in bad.field_violations]
        elif detail.Unpack(failure):
            violations = [(violation.subject, violation.description) for violation in failure.violations]
        elif detail.Unpack(retry):
            retry_delay_seconds = retry.retry_delay.ToNanoseconds() / 1e9
    metadata: dict[str, str] = dict(information.metadata)
    return errors.BY_REASON.get(information.reason, errors.Unexpected)(
        status.message,
        field=metadata.pop("field", ""),
        resource=metadata.pop("resource", ""),
        retry_delay_seconds=retry_delay_seconds,
        violations=violations,
        **metadata,
    )


def _remember(tx: Transaction, key: RequestKey, sort: str, answer: bytes) -> None:
    tx.connection.execute(
        "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)",
        (key.subject, key.method, key.request_id, key.digest, tx.served_seconds, sort, answer),
    )


def _unpack(answer: Answer) -> Any:  # noqa: ANN401  # the type is named in the packed message
    if answer.response is None:
        raise errors.Unexpected(f"{answer.operation} is remembered where a response was expected")
    of = symbol_database.Default().GetSymbol(answer.response.TypeName())
    return of.FromString(answer.response.value)
