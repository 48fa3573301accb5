from __future__ import annotations

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from virtfleet_client import errors as client
from virtfleet_service import errors as service


@pytest.mark.parametrize("reason", sorted(service.BY_REASON))
def test_every_error_of_the_services_has_its_class_in_the_client(reason: str) -> None:
    sent = service.BY_REASON[reason](
        "text", field="spec.x", resource="nodes/n1/domains/web", retry_delay_seconds=1.5, a="b"
    )
    received = client.from_status(sent.to_status())
    assert type(received).__name__ == type(sent).__name__
    assert received.reason == reason
    assert received.code() is sent.code
    assert received.details() == "text"
    assert received.metadata == {"a": "b", "field": "spec.x", "resource": "nodes/n1/domains/web"}
    assert received.retry_delay_seconds == 1.5
    if sent.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
        assert received.fields == ("spec.x",)


def test_a_reason_of_a_later_release_becomes_the_class_of_its_code() -> None:
    status = service.WrongState("text").to_status()
    info = status.details[0]
    info.value = info.value.replace(b"WRONG_STATE", b"OTHER_STATE")
    received = client.from_status(status)
    assert type(received) is client.FailedPrecondition
    assert received.reason == "OTHER_STATE"


def test_a_reason_under_another_code_is_not_believed() -> None:
    status = service.WrongState("text").to_status()
    status.code = code_pb2.NOT_FOUND
    assert type(client.from_status(status)) is client.NotFound


def test_a_transport_failure_has_the_class_of_its_code_and_no_reason() -> None:
    received = client.from_call(grpc.StatusCode.UNAVAILABLE, "connection refused", ())
    assert type(received) is client.Unavailable
    assert received.reason == ""
    assert str(received) == "UNAVAILABLE: connection refused"
    assert isinstance(received, grpc.RpcError)


def test_an_unknown_code_is_unknown() -> None:
    assert client.from_status(status_pb2.Status(code=99)).code() is grpc.StatusCode.UNKNOWN


def test_a_resource_in_the_wrong_state_is_no_field() -> None:
    status = status_pb2.Status(code=9, message="stopped")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="WRONG_STATE", domain="virtfleet.dev"))
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="WRONG_STATE", subject="nodes/n1/pools/p")
    failure.violations.add(type="WRONG_STATE", subject="domain.spec.memory.maximum_bytes")
    failure.violations.add(type="WRONG_STATE")
    status.details.add().Pack(failure)
    assert client.from_status(status).fields == ("domain.spec.memory.maximum_bytes",)
