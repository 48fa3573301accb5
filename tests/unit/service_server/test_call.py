"""A call as its handler sees it, also after its answer."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor

from virtfleet.compute.v1 import domain_pb2
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.methods import facts_of

DOMAINS: ServiceDescriptor = domain_pb2.DESCRIPTOR.services_by_name["DomainService"]


class Transport:
    """Stands for the transport of a call."""

    def __init__(self, remaining: float | None, **metadata: str) -> None:
        self._remaining = remaining
        self._metadata = tuple(metadata.items())

    def time_remaining(self) -> float | None:
        return self._remaining

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata


def call_of(transport: Transport | None, *prefixes: str, method: str = "ListDomains") -> Call:
    authorizer = Authorizer()
    facts = facts_of(DOMAINS.methods_by_name[method])
    authorizer.register(facts)
    caller = Caller("carol", ("viewer",), name_prefixes=prefixes)
    return Call(facts, caller, authorizer, node="n1", context=transport)


def test_time_runs_down_to_nothing_and_not_below() -> None:
    assert call_of(Transport(3.0)).remaining() == 3.0
    assert call_of(Transport(-3.0)).remaining() == 0.0
    assert call_of(Transport(None)).remaining() is None
    assert call_of(None).remaining() is None


def test_after_the_answer_there_is_no_deadline_and_the_metadata_stay() -> None:
    call = call_of(Transport(0.0, traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"))
    call.answered()
    assert call.remaining() is None
    assert call.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_detached_call_has_its_own_deadline() -> None:
    call = call_of(Transport(1.0, x="y"))
    call.resource = "nodes/n1/domains/a"
    alone = call.detached(deadline_seconds=50)
    left = alone.remaining()
    assert left is not None
    assert 40 < left <= 50
    assert (alone.metadata("x"), alone.resource, alone.caller) == ("y", call.resource, call.caller)
    assert call.detached().remaining() is None


def test_a_trace_that_does_not_parse_is_none() -> None:
    assert call_of(Transport(None, traceparent="nonsense")).trace_id == ""
    assert call_of(Transport(None)).trace_id == ""


def test_what_a_caller_may_see() -> None:
    everything = call_of(None)
    assert everything.sees_all
    assert everything.may_see("nodes/n1/domains/x")
    limited = call_of(None, "nodes/n1/domains/a-")
    assert not limited.sees_all
    assert limited.may_see("nodes/n1/domains/a-1")
    assert not limited.may_see("nodes/n1/domains/b-1")
    nothing = call_of(None, method="StartDomain")
    assert not nothing.sees_all
    assert not nothing.may_see("nodes/n1/domains/a-1")
