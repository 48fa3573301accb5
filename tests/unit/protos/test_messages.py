"""Rules for every message and field: heads, specs, maps, units, references."""

from __future__ import annotations

import re

from google.protobuf.descriptor import FieldDescriptor

from tests.unit.protos import descriptors
from tests.unit.protos.descriptors import HEAD

UNIT = re.compile(
    r"_(kb|mb|gb|tb|kib|mib|gib|tib|kbps|mbps|bps|ms|us|ns|msec|usec|nsec|secs?|seconds?|millis|minutes|hours|days|percent|pct)$"
)
# A number whose name says a size or a time must say bytes, or be a Duration or Timestamp.
BARE_SIZE = re.compile(r"(^|_)(size|capacity|allocation|memory|length)$")
BARE_TIME = re.compile(r"(^|_)(time|timeout|duration|interval|delay|period|age|deadline|uptime)$")
# Counted in items or bits, or by the rule of DataChunk.
SIZES_WITHOUT_UNIT = {"page_size", "prefix_length", "hole_length"}
# A checksum is a pattern of bits, not a quantity.
UNSIGNED_ALLOWED = {"crc32c"}
REFERENCES = {"volume", "network", "secret", "pool", "port", "filter", "device"}


def test_a_resource_has_the_whole_head() -> None:
    offenders = []
    for message in descriptors.messages():
        if descriptors.is_resource(message):
            for name, number in HEAD.items():
                field = message.fields_by_name.get(name)
                if field is None or field.number != number:
                    offenders.append(f"{message.full_name}.{name}: not field {number}")
    assert not offenders


def test_numbers_of_the_head_are_kept_free_in_every_resource() -> None:
    offenders = []
    names = {number: name for name, number in HEAD.items()}
    for message in descriptors.messages():
        if descriptors.resource_type(message) or descriptors.is_resource(message):
            offenders += [
                f"{field.full_name} = {field.number}"
                for field in message.fields
                if names.get(field.number, field.name) != field.name
                or HEAD.get(field.name, field.number) != field.number
            ]
    assert not offenders


def test_every_resource_declares_its_type_and_name_pattern() -> None:
    offenders = [
        message.full_name
        for message in descriptors.messages()
        if descriptors.is_resource(message)
        and not re.fullmatch(r"virtfleet\.dev/[A-Z]\w+", descriptors.resource_type(message))
    ]
    assert not offenders


def test_in_a_spec_every_scalar_is_optional_and_no_enum_is() -> None:
    offenders = []
    for message in descriptors.spec_messages():
        for field in message.fields:
            alone = field.containing_oneof is None or len(field.containing_oneof.fields) == 1
            if field.is_repeated or not alone:
                continue
            if field.cpp_type in descriptors.SCALARS and not field.has_presence:
                offenders.append(f"{field.full_name}: not optional")
            if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM and field.has_presence:
                offenders.append(f"{field.full_name}: an optional enum")
    assert not offenders


def test_labels_and_annotations_are_the_only_maps_of_text() -> None:
    offenders = []
    for field in descriptors.fields():
        if descriptors.is_map(field):
            entry = descriptors.target(field).fields_by_name
            key, value = entry["key"], entry["value"]
            text = field.name in {"labels", "annotations"} and value.type == value.TYPE_STRING
            if key.type != key.TYPE_STRING or not (text or value.message_type is not None):
                offenders.append(field.full_name)
    assert not offenders


def test_no_free_form_values() -> None:
    free = {"google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue", "google.protobuf.Any"}
    offenders = [
        field.full_name for field in descriptors.fields() if field.message_type and field.message_type.full_name in free
    ]
    assert not offenders


def test_integers_are_signed() -> None:
    unsigned = {
        FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_FIXED32,
        FieldDescriptor.TYPE_FIXED64,
    }
    offenders = [
        field.full_name
        for field in descriptors.fields()
        if field.type in unsigned and field.name not in UNSIGNED_ALLOWED
    ]
    assert not offenders


def test_units_are_bytes_ratios_durations_and_timestamps() -> None:
    offenders = []
    for field in descriptors.fields():
        number = field.cpp_type in descriptors.NUMBERS
        if number and UNIT.search(field.name) and not field.name.endswith("_per_second"):
            offenders.append(f"{field.full_name}: unit")
        if number and BARE_SIZE.search(field.name) and field.name not in SIZES_WITHOUT_UNIT:
            offenders.append(f"{field.full_name}: a size that does not say bytes")
        if number and BARE_TIME.search(field.name):
            offenders.append(f"{field.full_name}: a time as a number")
        if field.name.endswith("_ratio") and field.type != field.TYPE_DOUBLE:
            offenders.append(f"{field.full_name}: a ratio is a double")
        # An MTU and the like never pass 2 GiB.
        if field.name.endswith("_bytes") and field.type not in {field.TYPE_INT64, field.TYPE_INT32}:
            offenders.append(f"{field.full_name}: bytes are an integer")
    assert not offenders


def test_times_are_named_as_times() -> None:
    offenders = [
        field.full_name
        for field in descriptors.fields()
        if field.message_type is not None
        and field.message_type.full_name == "google.protobuf.Timestamp"
        and not re.search(r"(^|_)(time|times|since)$", field.name)
    ]
    assert not offenders


def test_references_in_specs_say_what_they_refer_to() -> None:
    offenders = []
    for message in descriptors.spec_messages():
        for field in message.fields:
            named = field.type == field.TYPE_STRING and field.name in REFERENCES
            if named and not descriptors.reference(field):
                offenders.append(field.full_name)
    assert not offenders


def test_booleans_are_named_for_their_effect() -> None:
    offenders = [
        field.full_name
        for field in descriptors.fields()
        if field.type == field.TYPE_BOOL
        and re.match(r"(is|has|disable|no|not|dont)_", field.name)
        and field.name != "has_value"
    ]
    assert not offenders


def test_options_for_go_and_java() -> None:
    offenders = []
    for file in descriptors.sources():
        part = file.package.split(".")[1]
        wanted = {
            "go_package": f"virtfleet.dev/go/{part}/v1;{part}v1",
            "java_package": f"dev.virtfleet.{part}.v1",
            "java_multiple_files": True,
        }
        for name, value in wanted.items():
            if getattr(file.options, name) != value:
                offenders.append(f"{file.name}: {name} is not {value}")
        if file.package != ".".join(file.name.split("/")[:-1]):
            offenders.append(f"{file.name}: package {file.package}")
    assert not offenders
