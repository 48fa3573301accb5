"""How people say names, and what fields a path of an update mask names."""

from __future__ import annotations

import click
import pytest

from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet_cli.kinds import BY_NAME, KINDS, bytes_text, enum_name
from virtfleet_cli.masks import assign, split, value_at
from virtfleet_cli.verbs import kind_of


@pytest.mark.parametrize(
    ("kind", "given", "node", "full"),
    [
        ("domain", "web", "", "nodes/-/domains/web"),
        ("domain", "web", "n1", "nodes/n1/domains/web"),
        ("domain", "n1/web", "", "nodes/n1/domains/web"),
        ("domain", "nodes/n1/domains/web", "n2", "nodes/n1/domains/web"),
        ("volume", "p/v", "n1", "nodes/n1/pools/p/volumes/v"),
        ("volume", "n1/p/v", "", "nodes/n1/pools/p/volumes/v"),
        ("port", "n1/lan/a", "", "nodes/n1/networks/lan/ports/a"),
        ("node", "n1", "", "nodes/n1"),
        ("node", "nodes/n1", "", "nodes/n1"),
    ],
)
def test_a_name_may_be_short(kind: str, given: str, node: str, full: str) -> None:
    assert BY_NAME[kind].name(given, node) == full


@pytest.mark.parametrize(("kind", "given"), [("domain", "a/b/c"), ("volume", "v"), ("node", "a/b")])
def test_a_name_that_can_be_none_is_refused(kind: str, given: str) -> None:
    with pytest.raises(click.ClickException, match="is no name of a"):
        BY_NAME[kind].name(given, "")


@pytest.mark.parametrize(
    ("given", "noun", "own"),
    [
        ("web", "domain", "web"),
        ("n1/web", "domain", "n1/web"),
        ("networks/lan", "network", "lan"),
        ("net/n1/lan", "network", "n1/lan"),
        ("pools/images", "pool", "images"),
        ("vm/web", "domain", "web"),
        ("nodes/n1/networks/lan", "network", "nodes/n1/networks/lan"),
        ("nodes/n1/domains/web", "domain", "nodes/n1/domains/web"),
        # Nothing that starts: a node of that name, as everywhere.
        ("volumes/web", "domain", "volumes/web"),
    ],
)
def test_a_verb_is_told_the_kind_in_front_of_the_name(given: str, noun: str, own: str) -> None:
    kind, name = kind_of(given)
    assert (kind.noun, name) == (noun, own)


def test_every_kind_can_be_listed_and_read() -> None:
    for kind in KINDS:
        assert {kind.method_name("List"), kind.method_name("Get")} <= kind.methods, kind.noun
        for column in kind.columns:
            assert isinstance(column.value(kind.message_class()), str), (kind.noun, column.title)


def test_paths_and_values() -> None:
    domain = domain_pb2.Domain(labels={"example.com/team": "a"})
    assert split("labels.`example.com/team`.x") == ["labels", "example.com/team", "x"]
    assert value_at(domain, "labels.`example.com/team`") == "a"
    assert value_at(domain, "spec.memory.maximum_bytes") is None
    assign(domain, "spec.memory.maximum_bytes", "2GiB")
    assign(domain, "spec.disks.root.volume", "pools/p/volumes/v")
    assign(domain, "spec.on_exit.crash", "stop")
    assert value_at(domain, "spec.memory.maximum_bytes") == 2 << 30
    assert domain.spec.disks["root"].volume == "pools/p/volumes/v"
    with pytest.raises(click.ClickException, match="did you mean `memory`"):
        assign(domain, "spec.memroy.maximum_bytes", "1")
    with pytest.raises(click.ClickException, match="must be a number"):
        assign(domain, "spec.memory.maximum_bytes", "much")
    with pytest.raises(click.ClickException, match="no single value"):
        assign(domain, "spec.memory", "1")


def test_texts_for_people() -> None:
    assert [bytes_text(size) for size in (0, 1023, 1536, 10 << 30)] == ["0 B", "1023 B", "1.5 KiB", "10 GiB"]
    status = domain_pb2.DomainStatus(state=domain_pb2.DOMAIN_STATE_SHUT_OFF)
    assert enum_name(status, "state") == "SHUT_OFF"
    assert enum_name(domain_pb2.DomainStatus(), "state") == ""


def test_figures_of_a_host_that_was_not_read_are_no_zeros() -> None:
    titles = [column.title for column in BY_NAME["node"].columns]
    of = {title: BY_NAME["node"].columns[titles.index(title)].value for title in ("DOMAINS", "MEMORY")}
    node = node_pb2.Node()
    # The storage service may have been read already.
    node.status.allocated.storage_bytes = 1
    assert (of["DOMAINS"](node), of["MEMORY"](node)) == ("-", "-")
    node.status.capacity.vcpu_count = 2
    assert (of["DOMAINS"](node), of["MEMORY"](node)) == ("0", "0 B")
