"""Rules for every method: how it is routed, what a mutation carries, what it returns."""

from __future__ import annotations

import re

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from tests.unit.protos import descriptors
from virtfleet.type.v1 import method_pb2

FIXED_NUMBERS = {
    "etag": 90,
    "request_id": 91,
    "validate_only": 92,
    "scope": 93,
    "inline_wait": 94,
    "expected_uid": 95,
    "allow_missing": 96,
    "allow_stale": 97,
    "read_through": 98,
}
LIST_NUMBERS = {"page_size": 2, "page_token": 3, "filter": 4, "order_by": 5, "view": 6}
OPERATION = "google.longrunning.Operation"

WITHOUT_PERMISSION = {
    # Anyone who can connect may ask who he is.
    "virtfleet.common.v1.AccessService.WhoAmI",
    # Whoever holds a certificate may renew that one.
    "virtfleet.fleet.v1.EnrollmentService.RenewCertificate",
}
# Text to a hypervisor's monitor or a guest's agent: what it does is not known.
RAW_COMMANDS = {
    "virtfleet.compute.v1.DebugService.ExecuteMonitorCommand",
    "virtfleet.compute.v1.DebugService.ExecuteAgentCommand",
}


def public_methods() -> list[MethodDescriptor]:
    """All but the node's own ones: those are keyed by domain uid and device id, on sockets of that node only."""
    return [method for method in descriptors.methods() if descriptors.package(method) != "node"]


def routing_field(message: Descriptor) -> FieldDescriptor | None:
    field = message.fields_by_number.get(1)
    if field is not None and field.message_type is not None:
        field = field.message_type.fields_by_number.get(1)
        return field if field is not None and field.name == "name" else None
    return field if field is not None and field.name in {"name", "parent"} else None


def test_field_1_routes_every_request() -> None:
    offenders = []
    for method in descriptors.methods():
        field = routing_field(method.input_type)
        if field is None or field.type != field.TYPE_STRING or field.is_repeated:
            offenders.append(method.full_name)
    assert not offenders


def test_fields_that_all_requests_share_have_their_numbers() -> None:
    offenders = []
    numbers = {number: name for name, number in FIXED_NUMBERS.items()}
    for message in {method.input_type.full_name: method.input_type for method in public_methods()}.values():
        for field in message.fields:
            fixed = FIXED_NUMBERS.get(field.name, field.number)
            if fixed != field.number or numbers.get(field.number, field.name) != field.name:
                offenders.append(f"{field.full_name} = {field.number}")
    assert not offenders


def test_every_method_says_permission_and_effect() -> None:
    offenders = []
    for method in descriptors.methods():
        rule = descriptors.rule(method)
        open_to_all = rule.anonymous or method.full_name in WITHOUT_PERMISSION
        if rule.effect == method_pb2.EFFECT_UNSPECIFIED:
            offenders.append(f"{method.full_name}: no effect")
        if not open_to_all and not re.fullmatch(r"[a-z][A-Za-z]*(\.[a-z][A-Za-z]*)+", rule.permission):
            offenders.append(f"{method.full_name}: permission {rule.permission!r}")
    assert not offenders


def test_what_touches_a_back_end_returns_an_operation_and_nothing_else_does() -> None:
    offenders = []
    for method in public_methods():
        if method.client_streaming or method.server_streaming or method.full_name in RAW_COMMANDS:
            continue
        touches = descriptors.rule(method).effect == method_pb2.EFFECT_BACKEND
        if touches != (method.output_type.full_name == OPERATION):
            offenders.append(method.full_name)
    assert not offenders


def test_every_mutation_has_request_id_and_validate_only() -> None:
    offenders = []
    for method in public_methods():
        # An open stream of bytes in both directions can neither be repeated nor only be validated.
        both_ways = method.client_streaming and method.server_streaming
        if descriptors.mutates(method) and not both_ways:
            missing = {"request_id", "validate_only"} - set(method.input_type.fields_by_name)
            if missing:
                offenders.append(f"{method.full_name}: {sorted(missing)}")
    assert not offenders


def test_reads_have_no_fields_of_mutations() -> None:
    offenders = []
    for method in public_methods():
        if not descriptors.mutates(method):
            present = {"request_id", "validate_only", "scope", "allow_missing"} & set(method.input_type.fields_by_name)
            if present:
                offenders.append(f"{method.full_name}: {sorted(present)}")
    assert not offenders


def test_verbs_and_deletes_of_a_resource_take_etag_and_expected_uid() -> None:
    offenders = []
    for method in public_methods():
        if not descriptors.mutates(method) or method.name.startswith(("Create", "Update", "Batch")):
            continue
        # Who has no identity yet has seen no resource either.
        if descriptors.rule(method).anonymous:
            continue
        for message in descriptors.messages():
            same = descriptors.package(message) == descriptors.package(method) and method.name.endswith(message.name)
            if same and descriptors.is_resource(message) and "etag" in message.fields_by_name:
                missing = {"etag", "expected_uid"} - set(method.input_type.fields_by_name)
                if missing:
                    offenders.append(f"{method.full_name}: {sorted(missing)}")
    assert not offenders


def test_updates_carry_resource_and_mask_and_no_second_etag() -> None:
    offenders = []
    for method in public_methods():
        if not re.match(r"Update[A-Z]", method.name):
            continue
        fields = method.input_type.fields_by_name
        mask = fields.get("update_mask")
        resource = method.input_type.fields_by_number.get(1)
        if mask is None or mask.number != 2 or descriptors.target(mask).full_name != "google.protobuf.FieldMask":
            offenders.append(f"{method.full_name}: update_mask is not field 2")
        if resource is None or resource.message_type is None or not descriptors.is_resource(resource.message_type):
            offenders.append(f"{method.full_name}: field 1 is no resource")
        if {"etag", "expected_uid"} & set(fields):
            offenders.append(f"{method.full_name}: etag and uid stand in the resource")
    assert not offenders


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def test_creates_carry_parent_resource_and_id() -> None:
    offenders = []
    for method in public_methods():
        kind = re.fullmatch(r"Create([A-Z]\w+)", method.name)
        if not kind:
            continue
        wanted = [(1, "parent"), (2, snake(kind[1])), (3, f"{snake(kind[1])}_id")]
        for number, name in wanted:
            field = method.input_type.fields_by_number.get(number)
            if field is None or field.name != name:
                offenders.append(f"{method.full_name}: field {number} is not {name}")
    assert not offenders


def paged_lists() -> list[MethodDescriptor]:
    return [
        method
        for method in public_methods()
        if method.name.startswith("List") and "parent" in method.input_type.fields_by_name
    ]


def test_lists_ask_for_pages_with_the_same_numbers() -> None:
    offenders = []
    numbers = {number: name for name, number in LIST_NUMBERS.items()}
    for method in paged_lists():
        fields = method.input_type.fields_by_name
        offenders += [f"{method.full_name}: no {name}" for name in ("page_size", "page_token") if name not in fields]
        for field in method.input_type.fields:
            fixed = LIST_NUMBERS.get(field.name, field.number)
            if fixed != field.number or numbers.get(field.number, field.name) != field.name:
                offenders.append(f"{field.full_name} = {field.number}")
    assert not offenders


def test_lists_answer_with_the_same_numbers() -> None:
    offenders = []
    for method in paged_lists():
        answer = method.output_type
        first, second = answer.fields_by_number.get(1), answer.fields_by_number.get(2)
        if first is None or not first.is_repeated or first.message_type is None:
            offenders.append(f"{method.full_name}: field 1 is not the resources")
        if second is None or second.name != "next_page_token":
            offenders.append(f"{method.full_name}: field 2 is not next_page_token")
        if descriptors.package(method) in {"compute", "storage", "network"}:
            missing = {"unreachable", "resume_token"} - set(answer.fields_by_name)
            offenders += [f"{method.full_name}: no {name}" for name in sorted(missing)]
    assert not offenders


def test_names_of_methods_are_unique_in_a_package() -> None:
    # The gateway and the permissions tell methods apart by package and name in logs and in the denial list.
    seen: dict[tuple[str, str], str] = {}
    offenders = []
    for method in descriptors.methods():
        key = (descriptors.package(method), method.name)
        if key in seen:
            offenders.append(f"{method.full_name} and {seen[key]}")
        seen[key] = method.full_name
    assert not offenders


NODE_PACKAGES = {"compute", "storage", "network"}


def test_lists_have_the_same_limits() -> None:
    offenders = []
    for method in public_methods():
        for field in method.input_type.fields:
            rules = descriptors.rules(field)
            if field.name == "page_size" and (rules.int32.gte, rules.int32.lte) != (0, 5000):
                offenders.append(f"{field.full_name}: up to {rules.int32.lte}")
            if field.name == "page_token" and rules.string.max_len != 1 << 20:
                offenders.append(f"{field.full_name}: at most {rules.string.max_len} characters")
            if field.name == "filter" and rules.string.max_len != 4096:
                offenders.append(f"{field.full_name}: at most {rules.string.max_len} characters")
    assert not offenders


def test_reads_refuse_enum_values_that_they_do_not_know() -> None:
    # A mutation is refused with UNKNOWN_FIELD before its rules are looked at.
    offenders = []
    for method in public_methods():
        if descriptors.mutates(method):
            continue
        for field in method.input_type.fields:
            if field.enum_type is None:
                continue
            rules = descriptors.rules(field)
            rule = rules.repeated.items.enum if field.is_repeated else rules.enum
            if not rule.defined_only or (field.is_repeated and list(rule.not_in) != [0]):
                offenders.append(field.full_name)
    assert not offenders


def test_parents_on_a_node_say_what_they_are() -> None:
    # The form of a name is judged by the reference alone: `nodes/n1/anything` would be taken for the node.
    offenders = []
    for method in public_methods():
        parent = method.input_type.fields_by_name.get("parent")
        if parent is None or descriptors.package(method) not in NODE_PACKAGES:
            continue
        if not descriptors.reference(parent):
            offenders.append(f"{parent.full_name}: no reference")
        if field_behavior_pb2.REQUIRED not in descriptors.behaviors(parent):
            offenders.append(f"{parent.full_name}: not required")
    assert not offenders


def test_reads_of_a_resource_choose_its_freshness() -> None:
    offenders = []
    for method in public_methods():
        # By what it is found is known to its node alone.
        if descriptors.package(method) not in NODE_PACKAGES or method.name.startswith("Lookup"):
            continue
        output = method.output_type
        many = method.name.startswith(("List", "BatchGet")) and "freshness" in output.fields_by_name
        if not many and not (method.name.startswith("Get") and descriptors.resource_type(output)):
            continue
        if method.name != "ListEvents":
            missing = {"allow_stale", "read_through"} - set(method.input_type.fields_by_name)
            offenders += [f"{method.full_name}: no {name}" for name in sorted(missing)]
    assert not offenders


def test_batches_that_get_tell_how_fresh_they_are() -> None:
    offenders = [
        method.full_name
        for method in public_methods()
        if method.name.startswith("BatchGet") and "freshness" not in method.output_type.fields_by_name
    ]
    assert not offenders


def test_what_is_created_on_a_node_may_be_given_its_uid() -> None:
    offenders = []
    for method in public_methods():
        if re.match(r"Create[A-Z]", method.name) and descriptors.package(method) in NODE_PACKAGES:
            resource = descriptors.target(method.input_type.fields_by_number[2])
            if field_behavior_pb2.IMMUTABLE not in descriptors.behaviors(resource.fields_by_name["uid"]):
                offenders.append(f"{resource.full_name}.uid")
    assert not offenders
