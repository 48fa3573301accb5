from __future__ import annotations

from typing import Any, TypeAlias

import pytest
from google.longrunning import operations_pb2
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.service.rig import domain
from virtfleet.compute.v1 import domain_pb2
from virtfleet.type.v1 import operation_pb2
from virtfleet_service import errors
from virtfleet_service.filters import compile_filter, compile_roots


def sample() -> domain_pb2.Domain:
    made = domain("web-1", env="prod", state="RUNNING")
    made.display_name = 'VM_01 "test"'
    made.labels["example.com/team"] = "red"
    made.spec.deletion_protection = False
    made.spec.cpu.vcpu_count = 4
    made.spec.disks["root"].boot_order = 2
    made.status.addresses.add(address="10.0.0.2", prefix_length=24)
    made.status.addresses.add(address="10.0.0.3", prefix_length=16)
    made.status.operations.append("op1")
    made.create_time.FromJsonString("2026-03-01T12:00:00Z")
    return made


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "status.state = RUNNING",
        "status.state=DOMAIN_STATE_RUNNING",
        'status.state = "RUNNING"',
        "status.state != SHUT_OFF",
        "labels.env = prod",
        'labels.env = "prod"',
        "labels.env = 'prod'",
        "labels.env = pr*",
        "labels.env = *od",
        "labels.env = *ro*",
        "labels.env:*",
        "labels.env : ro",
        "labels:env",
        'labels:"env"',
        'labels."example.com/team" = red',
        "labels.`example.com/team` = red",
        "labels.example.com/team = red",
        "labels.other != prod",
        "NOT labels:other",
        "-labels:other",
        'name = "nodes/n1/domains/web-*"',
        "name:web",
        r'display_name = "VM_01 \"test\""',
        "spec.cpu.vcpu_count = 4",
        "spec.cpu.vcpu_count >= 4 AND spec.cpu.vcpu_count < 5",
        "spec.cpu.vcpu_count > 1 spec.cpu.vcpu_count <= 4",
        "spec.deletion_protection = false",
        "spec.deletion_protection:*",
        "NOT spec.description:*",
        "spec.memory:*",
        "spec.disks.root.boot_order = 2",
        "spec.disks:root",
        "spec.disks:*",
        'status.addresses.address = "10.0.0.3"',
        "status.addresses.address = 10.0.0.3",
        "status.addresses.prefix_length < 20",
        "status.addresses:*",
        "status.operations:op1",
        'create_time > "2026-01-01T00:00:00Z"',
        "create_time <= 2026-03-01T13:00:00+01:00",
        "generation = 1",
        "labels.env = test OR labels.env = prod",
        "labels.env = prod AND labels.x = y OR status.state = RUNNING",
        "(labels.env = test AND labels.x = y) OR status.state = RUNNING",
        "NOT (labels.env = test OR labels.x = y)",
        "labels.env=prod AND(status.state=RUNNING)",
    ],
)
def test_holds(text: str) -> None:
    assert compile_filter(text, domain_pb2.Domain)(sample())


@pytest.mark.parametrize(
    "text",
    [
        "status.state = SHUT_OFF",
        "status.state != RUNNING",
        "labels.env = pro",
        "labels.env != prod",
        "labels:other",
        "labels.other = x",
        "spec.cpu.vcpu_count != 4",
        "spec.description = x",
        "spec.description < x",
        "spec.disks.absent.boot_order = 2",
        "spec.disks.absent.boot_order < 2",
        "status.addresses.address != 10.0.0.3",
        "status.operations:op",
        "create_time < 2026-01-01T00:00:00Z",
        "labels.x = y OR labels.env = prod AND labels.x = y",
        "NOT labels.env = prod",
    ],
)
def test_does_not_hold(text: str) -> None:
    assert not compile_filter(text, domain_pb2.Domain)(sample())


@pytest.mark.parametrize(
    ("relation", "holds"), [("=", True), ("<=", True), (">=", True), ("!=", False), ("<", False), (">", False)]
)
def test_a_time_as_clients_read_it_is_that_very_time(relation: str, *, holds: bool) -> None:
    made = domain_pb2.Domain()
    made.create_time.FromNanoseconds(1_772_366_400_123_456_789)
    text = f'create_time {relation} "{made.create_time.ToJsonString()}"'
    assert compile_filter(text, domain_pb2.Domain)(made) is holds


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("state = RUNNING", 0),
        ("status.nothing = 1", 0),
        ("labels.env", 10),
        ("labels.env =", 12),
        ("labels.env = prod)", 17),
        ("(labels.env = prod", 0),
        ("labels.env = prod AND", 21),
        ("labels.env = prod OR OR", 21),
        ("AND labels.env = prod", 0),
        ("spec.cpu.vcpu_count = many", 22),
        ("spec.cpu.vcpu_count = 1.5", 22),
        ("spec.deletion_protection = 1", 27),
        ("spec.deletion_protection < true", 0),
        ("status.state = FLYING", 15),
        ("status.state < RUNNING", 0),
        ("create_time > yesterday", 14),
        ("create_time > 2026-01-01T00:00:00", 14),
        ("create_time.seconds = 1", 0),
        ("spec.memory = 1", 0),
        ("spec.disks = root", 0),
        ("spec.disks.root = x", 0),
        ("labels = x", 0),
        ("labels.env = prod @", 18),
        ("= prod", 0),
        ('"labels" = prod', 0),
    ],
)
def test_refused_with_the_place(text: str, position: int) -> None:
    with pytest.raises(errors.FilterSyntax) as caught:
        compile_filter(text, domain_pb2.Domain)
    assert caught.value.field == "filter"
    assert caught.value.metadata["position"] == str(position), caught.value.message


def test_length_depth_and_terms_are_bounded() -> None:
    for text in (
        "(" * 100 + "labels:a" + ")" * 100,
        "labels:a " * 150,
        "labels:a" + " " * 5000,
        "NOT " * 1000 + "labels:a",
    ):
        with pytest.raises(errors.FilterSyntax):
            compile_filter(text, domain_pb2.Domain)


def test_several_messages_at_once() -> None:
    roots = (operations_pb2.Operation.DESCRIPTOR, operation_pb2.OperationMetadata.DESCRIPTOR)
    test = compile_roots('done = true AND target = "nodes/n1/domains/*"', roots)
    metadata = operation_pb2.OperationMetadata(target="nodes/n1/domains/a")
    assert test((operations_pb2.Operation(done=True), metadata))
    assert not test((operations_pb2.Operation(), metadata))


words = [
    "labels.env",
    "status.state",
    "spec.cpu.vcpu_count",
    "RUNNING",
    "4",
    "AND",
    "OR",
    "NOT",
    "-",
    "(",
    ")",
    "=",
    "!=",
    "<",
    ":",
    '"x"',
    "*",
    "`",
    ".",
]


@given(st.one_of(st.lists(st.sampled_from(words), max_size=14).map(" ".join), st.text(max_size=60)))
def test_any_text_compiles_or_is_refused_with_a_place_inside_it(text: str) -> None:
    try:
        test = compile_filter(text, domain_pb2.Domain)
    except errors.FilterSyntax as error:
        position = int(error.metadata["position"])
    else:
        position = 0
        assert test(sample()) in (True, False)
    assert 0 <= position <= len(text)


values = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(values, values)
def test_quoted_values_compare_whole(held: str, asked: str) -> None:
    made = domain_pb2.Domain(display_name=held)
    found = compile_filter(f"display_name = {quoted(asked)}", domain_pb2.Domain)(made)
    if not asked.startswith("*") and not asked.endswith("*"):
        assert found == (held == asked)
    assert compile_filter(f"display_name : {quoted(held)}", domain_pb2.Domain)(made)


Tree: TypeAlias = bool | tuple[str, Any, Any]
trees: st.SearchStrategy[Tree] = st.recursive(
    st.booleans(), lambda inner: st.tuples(st.sampled_from(["AND", "OR", "NOT"]), inner, inner), max_leaves=10
)


def written(tree: Tree) -> str:
    if isinstance(tree, bool):
        return "labels:a" if tree else "labels:b"
    kind, left, right = tree
    return f"NOT ({written(left)})" if kind == "NOT" else f"({written(left)} {kind} {written(right)})"


def meant(tree: Tree) -> bool:
    if isinstance(tree, bool):
        return tree
    kind, left, right = tree
    if kind == "NOT":
        return not meant(left)
    return (meant(left) and meant(right)) if kind == "AND" else (meant(left) or meant(right))


@given(trees)
def test_logic_agrees_with_python(tree: Tree) -> None:
    made = domain_pb2.Domain(labels={"a": ""})
    assert compile_filter(written(tree), domain_pb2.Domain)(made) == meant(tree)
