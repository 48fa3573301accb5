"""Facts of methods, read from descriptors of the real protos."""

from __future__ import annotations

import pytest
from google.longrunning import operations_pb2
from google.protobuf.descriptor import ServiceDescriptor

from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2
from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import methods
from virtfleet_service.methods import Item, facts_of, routing_number, snake

DOMAINS: ServiceDescriptor = domain_pb2.DESCRIPTOR.services_by_name["DomainService"]
VOLUMES: ServiceDescriptor = volume_pb2.DESCRIPTOR.services_by_name["VolumeService"]
OPERATIONS: ServiceDescriptor = operations_pb2.DESCRIPTOR.services_by_name["Operations"]


@pytest.mark.parametrize(
    ("name", "snaked"),
    [
        ("GetDomain", "get_domain"),
        ("WhoAmI", "who_am_i"),
        ("BatchGetDomainStats", "batch_get_domain_stats"),
        ("ServerReflectionInfo", "server_reflection_info"),
    ],
)
def test_names_of_handlers(name: str, snaked: str) -> None:
    assert snake(name) == snaked


def test_routing_fields() -> None:
    assert facts_of(DOMAINS.methods_by_name["GetDomain"]).routing == ("name",)
    assert facts_of(DOMAINS.methods_by_name["ListDomains"]).routing == ("parent",)
    assert facts_of(DOMAINS.methods_by_name["UpdateDomain"]).routing == ("domain", "name")
    assert facts_of(OPERATIONS.methods_by_name["ListOperations"]).routing == ("name",)
    assert routing_number(DOMAINS.methods_by_name["UpdateDomain"].input_type) == (1, 1)
    assert routing_number(OPERATIONS.methods_by_name["ListOperations"].input_type) == (4,)


def test_effects_and_kinds() -> None:
    start = facts_of(DOMAINS.methods_by_name["StartDomain"])
    assert (start.permission, start.effect, start.mutation, start.is_operation) == (
        "domains.start",
        methods.BACKEND,
        True,
        True,
    )
    get = facts_of(DOMAINS.methods_by_name["GetDomain"])
    assert (get.permission, get.mutation, get.is_operation) == ("domains.get", False, False)
    # It answers with one, but is none: its work does not outlive the call.
    assert not facts_of(OPERATIONS.methods_by_name["GetOperation"]).is_operation
    assert facts_of(VOLUMES.methods_by_name["UploadVolume"]).client_streaming


def test_a_method_without_a_rule_does_not_load() -> None:
    with pytest.raises(methods.RuleMissingError):
        facts_of(OPERATIONS.methods_by_name["GetOperation"], {})


def test_names_of_operations_are_judged_by_the_operations_service() -> None:
    assert not facts_of(OPERATIONS.methods_by_name["GetOperation"]).checks_names
    assert facts_of(DOMAINS.methods_by_name["GetDomain"]).checks_names


def test_what_must_be_named() -> None:
    assert facts_of(DOMAINS.methods_by_name["GetDomain"]).routing_required
    who = admin_pb2.DESCRIPTOR.services_by_name["AccessService"].methods_by_name["WhoAmI"]
    assert not facts_of(who).routing_required


def test_ids_and_items_of_what_is_made() -> None:
    assert facts_of(DOMAINS.methods_by_name["CreateDomain"]).id_field == "domain_id"
    assert facts_of(DOMAINS.methods_by_name["BatchCreateDomains"]).items == (Item("requests", "domain_id"),)
    assert facts_of(DOMAINS.methods_by_name["GetDomain"]).id_field == ""


def test_every_reference_in_a_spec_is_found_with_its_path() -> None:
    facts = facts_of(DOMAINS.methods_by_name["CreateDomain"])
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web")
    spec = request.domain.spec
    spec.disks["root"].volume = "pools/p/volumes/root"
    spec.disks["data"].volume = "pools/p/volumes/data"
    spec.interfaces["eth0"].network = "networks/n"
    spec.os.kernel.kernel_volume = "pools/p/volumes/kernel"
    request.new_volumes.add(pool="pools/p")
    found = {
        reference.path: (reference.value, reference.facts.collection) for reference in facts.references.find(request)
    }
    assert found == {
        "domain.spec.disks.root.volume": ("pools/p/volumes/root", "volumes"),
        "domain.spec.disks.data.volume": ("pools/p/volumes/data", "volumes"),
        "domain.spec.interfaces.eth0.network": ("networks/n", "networks"),
        "domain.spec.os.kernel.kernel_volume": ("pools/p/volumes/kernel", "volumes"),
        "new_volumes[0].pool": ("pools/p", "pools"),
    }


def test_the_target_of_a_call_is_no_reference() -> None:
    for service, name in ((DOMAINS, "GetDomain"), (DOMAINS, "ListDomains"), (VOLUMES, "DeleteVolume")):
        assert not facts_of(service.methods_by_name[name]).references


def test_all_services_of_the_node_have_facts() -> None:
    for service in attachment_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert facts_of(method).permission
