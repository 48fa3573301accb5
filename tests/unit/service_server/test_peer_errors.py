"""Errors as they come back from other processes."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from virtfleet_service import errors
from virtfleet_service.peers import error_from_status, errors_from_rpc


@pytest.mark.parametrize("reason", sorted(errors.BY_REASON))
def test_every_error_survives_the_way(reason: str) -> None:
    kind = errors.BY_REASON[reason]
    sent = kind("text", field="spec.x", resource="nodes/n1/domains/a", retry_delay_seconds=1.5, holder="b")
    got = error_from_status(sent.to_status())
    assert type(got) is kind
    assert got.message == "text"
    assert got.field == "spec.x"
    assert got.resource == "nodes/n1/domains/a"
    assert got.retry_delay_seconds == 1.5
    assert got.metadata == {"holder": "b"}
    assert got.to_status() == sent.to_status()


def test_a_reason_of_a_newer_release_keeps_code_and_reason() -> None:
    status = status_pb2.Status(code=9, message="new")
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="BRAND_NEW", domain=errors.DOMAIN, metadata={"a": "b"}))
    status.details.append(detail)
    got = error_from_status(status)
    assert isinstance(got, errors.FailedPrecondition)
    assert (got.reason, got.metadata) == ("BRAND_NEW", {"a": "b"})
    assert errors.FailedPrecondition.reason != "BRAND_NEW"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.BackendUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.OperationTimedOut),
        (grpc.StatusCode.UNIMPLEMENTED, errors.MethodNotImplemented),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.UNKNOWN, errors.Unexpected),
    ],
)
def test_an_error_of_grpc_itself_has_a_class_too(code: grpc.StatusCode, kind: type[errors.VirtfleetError]) -> None:
    for trailers in ((), (("grpc-status-details-bin", b"\xff\xff"),)):
        error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details="text")
        assert isinstance(errors_from_rpc(error), kind)
