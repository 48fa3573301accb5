from __future__ import annotations

from virtfleet.compute.v1 import domain_pb2
from virtfleet_client.errors import from_status
from virtfleet_compute import statuses
from virtfleet_compute.drivers.api import DomainObservation


def test_a_run_that_failed_has_a_reason_and_not_words_alone() -> None:
    domain = domain_pb2.Domain(name="nodes/n1/domains/web")
    state, reason = domain_pb2.DOMAIN_STATE_SHUT_OFF, domain_pb2.DOMAIN_STATE_REASON_HYPERVISOR_DIED
    statuses.observed(domain, DomainObservation(uid="u", state=state, reason=reason, failure="it fell"))
    error = from_status(domain.status.last_failure)
    assert (error.reason, error.code().name, error.details()) == ("HYPERVISOR_FAILED", "INTERNAL", "it fell")
