"""What a person is told to try next."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from virtfleet_cli.failures import sentence
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


def test_advice_that_lacks_a_variable_is_not_given() -> None:
    assert told("RESOURCE_IN_USE") == "it is so (RESOURCE_IN_USE)"
