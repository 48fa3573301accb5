"""What a person is told to try next."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from virtfleet_cli.failures import EXIT_REFUSED, EXIT_UNREACHABLE, exit_code, sentence
from virtfleet_client.errors import from_status


def told(reason: str, **metadata: str) -> str:
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="virtfleet.dev", metadata=metadata))
    return sentence(from_status(status_pb2.Status(code=9, message="it is so", details=[packed])))


@pytest.mark.parametrize(
    ("resource", "state", "following"),
    [
        ("nodes/n1/networks/lan", "INACTIVE", "`virtfleet start nodes/n1/networks/lan` starts it"),
        ("nodes/n1/pools/images", "RUNNING", "`virtfleet stop nodes/n1/pools/images` stops it"),
        ("nodes/n1/networks/lan", "DELETING", "`virtfleet describe networks nodes/n1/networks/lan` shows its state"),
        ("nodes/n1/domains/web", "RUNNING", "`virtfleet describe domains nodes/n1/domains/web` shows its state"),
    ],
)
def test_a_wrong_state_is_told_the_verb_that_changes_it(resource: str, state: str, following: str) -> None:
    assert told("WRONG_STATE", resource=resource, state=state) == f"it is so (WRONG_STATE)\n  next: {following}"


@pytest.mark.parametrize(
    ("reason", "code"),
    [("GUEST_DID_NOT_COMPLY", EXIT_REFUSED), ("OPERATION_TIMED_OUT", EXIT_REFUSED), ("", EXIT_UNREACHABLE)],
)
def test_what_took_too_long_at_a_server_that_answers_is_a_failure(reason: str, code: int) -> None:
    status = status_pb2.Status(code=code_pb2.DEADLINE_EXCEEDED)
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="virtfleet.dev"))
    assert exit_code(from_status(status)) == code


def test_advice_that_lacks_a_variable_is_not_given() -> None:
    assert told("RESOURCE_IN_USE") == "it is so (RESOURCE_IN_USE)"
