"""Roles, scopes and the policy file."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import console_pb2, domain_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import authorization, errors
from virtfleet_service.authorization import Authorizer, PolicyError, parse_policy
from virtfleet_service.call import Caller
from virtfleet_service.methods import facts_of

SERVICES: tuple[ServiceDescriptor, ...] = (
    domain_pb2.DESCRIPTOR.services_by_name["DomainService"],
    console_pb2.DESCRIPTOR.services_by_name["ConsoleService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    volume_pb2.DESCRIPTOR.services_by_name["VolumeService"],
)


@pytest.fixture
def judge() -> Authorizer:
    authorizer = Authorizer()
    for service in SERVICES:
        for method in service.methods:
            authorizer.register(facts_of(method))
    return authorizer


def holds(judge: Authorizer, role: str, permission: str) -> bool:
    return judge.prefixes(Caller("x", (role,)), permission) is not None


@pytest.mark.parametrize(
    ("permission", "roles"),
    [
        ("domains.get", "viewer operator admin"),
        ("domains.list", "viewer operator admin"),
        ("domains.start", "operator admin"),
        ("domains.delete", "operator admin"),
        ("volumes.use", "operator admin"),
        ("volumes.get", "viewer operator admin"),
        ("volumes.download", "operator admin"),
        ("volumes.attach", "operator admin"),
        ("consoles.open", "operator admin"),
        ("servers.get", "viewer operator admin"),
        ("servers.reload", "admin"),
        ("nodes.cordon", "admin"),
        ("nodes.list", "viewer operator admin"),
        ("certificates.revoke", "admin"),
        ("joinTokens.create", "admin"),
        ("secrets.access", "admin"),
        ("channelz.get", "admin"),
        ("debug.get", "admin"),
        (authorization.HOST_PATHS, "admin"),
        (authorization.RAW_DEVICES, "admin"),
        (authorization.EXTRA_ARGUMENTS, "admin"),
    ],
)
def test_what_the_built_in_roles_give(judge: Authorizer, permission: str, roles: str) -> None:
    held = [role for role in ("viewer", "operator", "admin") if holds(judge, role, permission)]
    assert held == roles.split()


def test_an_unknown_role_gives_nothing_and_no_permission_is_held_by_all(judge: Authorizer) -> None:
    nobody = Caller("x", ("emperor",))
    assert judge.prefixes(nobody, "domains.get") is None
    assert judge.prefixes(nobody, "") == ()


def test_scopes_of_one_role_do_not_widen_another(judge: Authorizer) -> None:
    caller = Caller("x", ("viewer", "operator@nodes/n1/domains/a-"))
    judge.authorize(caller, "domains.get", "nodes/n1/domains/b")
    judge.authorize(caller, "domains.start", "nodes/n1/domains/a-1")
    with pytest.raises(errors.PermissionMissing) as caught:
        judge.authorize(caller, "domains.start", "nodes/n1/domains/b")
    assert caught.value.metadata["permission"] == "domains.start"
    assert caught.value.resource == "nodes/n1/domains/b"


def test_limits_of_role_and_caller_hold_both(judge: Authorizer) -> None:
    caller = Caller("x", ("operator@nodes/n1/domains/a-", "operator@nodes/n2/"), name_prefixes=("nodes/n1/",))
    assert judge.prefixes(caller, "domains.start") == ("nodes/n1/domains/a-",)
    none = Caller("x", ("operator@nodes/n2/",), name_prefixes=("nodes/n1/",))
    assert judge.prefixes(none, "domains.start") is None


@pytest.mark.parametrize(
    ("prefix", "parent", "within"),
    [
        ("nodes/n1/domains/a-", "nodes/n1", True),
        ("nodes/n1/domains/a-", "nodes/n2", False),
        ("nodes/n1/domains/a-", "nodes/-", True),
        ("nodes/n", "nodes/n1", True),
        ("nodes/n1/pools/p/volumes/a", "nodes/n1/pools/p", True),
        ("nodes/n1/pools/p/volumes/a", "nodes/n1/pools/-", True),
        ("nodes/n1/pools/p/volumes/a", "nodes/n1/pools/q", False),
        ("nodes/n1/", "nodes/n1/pools/q", True),
        ("nodes/n1/pools/q", "nodes/n1/pools/qq", True),
        ("nodes/n1/domains/a-", "", True),
    ],
)
def test_where_a_list_may_find_something(judge: Authorizer, prefix: str, parent: str, within: bool) -> None:  # noqa: FBT001
    caller = Caller("x", ("viewer",), name_prefixes=(prefix,))
    if within:
        judge.authorize_within(caller, "domains.list", parent)
    else:
        with pytest.raises(errors.PermissionMissing):
            judge.authorize_within(caller, "domains.list", parent)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nodes/n1/domains/a-1", True),
        ("nodes/n1/domains/b", False),
        ("nodes/n1/domains", False),
        # Which name a uid has, its handler finds out; that it begins like a name says nothing.
        ("nodes/n1/domains/b0000000-0000-4000-8000-000000000000", True),
        ("nodes/n2/domains/a0000000-0000-4000-8000-000000000000", False),
        ("nodes/-/domains/b0000000-0000-4000-8000-000000000000", True),
        ("nodes/-/domains/a-1", True),
        ("nodes/-/domains/b", False),
        ("nodes/-/pools/a-1", False),
    ],
)
def test_what_may_be_looked_up(judge: Authorizer, name: str, found: bool) -> None:  # noqa: FBT001
    caller = Caller("x", ("viewer",), name_prefixes=("nodes/n1/domains/a-",))
    if found:
        judge.authorize_lookup(caller, "domains.get", name)
    else:
        with pytest.raises(errors.PermissionMissing):
            judge.authorize_lookup(caller, "domains.get", name)


segments = st.lists(st.sampled_from(["nodes", "n1", "n2", "domains", "a", "ab"]), min_size=1, max_size=4).map("/".join)


@given(prefix=segments, parent=segments, child=segments)
def test_whoever_may_touch_something_below_a_parent_may_list_there(prefix: str, parent: str, child: str) -> None:
    judge = Authorizer()
    caller = Caller("x", ("viewer",), name_prefixes=(prefix,))
    if f"{parent}/{child}".startswith(prefix):
        judge.authorize_within(caller, "domains.list", parent)


def test_the_viewers_socket_says_that_it_is_for_reading(judge: Authorizer) -> None:
    local = Caller("local:viewer", ("viewer",))
    with pytest.raises(errors.ReadOnlySocket):
        judge.authorize(local, "domains.start", "nodes/n1/domains/a")
    with pytest.raises(errors.PermissionMissing):
        judge.authorize(Caller("local:operator", ("operator",)), "servers.reload", "")


def test_the_policy_file_binds_subjects(judge: Authorizer, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        """
        [[binding]]
        subject = "spiffe://virtfleet.dev/user/ci-*"
        role = "operator"
        names = ["nodes/n1/domains/ci-", "nodes/n1/pools/ci/"]
        [[binding]]
        subject = "spiffe://virtfleet.dev/user/ci-1"
        role = "viewer"
        """
    )
    judge.load_policy(path)
    assert judge.bound_roles("spiffe://virtfleet.dev/user/ci-1") == (
        "operator@nodes/n1/domains/ci-",
        "operator@nodes/n1/pools/ci/",
        "viewer",
    )
    assert judge.bound_roles("spiffe://virtfleet.dev/user/ci") == ()
    path.write_text("[[binding]]\nsubject = 1\n")
    with pytest.raises(PolicyError):
        judge.load_policy(path)
    assert judge.bound_roles("spiffe://virtfleet.dev/user/ci-1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[binding", "not TOML"),
        ("bindings = 1", "unknown keys: bindings"),
        ("binding = 1", "array of tables"),
        ("binding = [1]", "not a table"),
        ('[[binding]]\nrole = "viewer"', "no subject"),
        ('[[binding]]\nsubject = "a"\nrole = "emperor"', "unknown role `emperor`"),
        ('[[binding]]\nsubject = "a"\nrole = "viewer"\nnames = []', "leave it out"),
        ('[[binding]]\nsubject = "a"\nrole = "viewer"\nnames = "x"', "list of name prefixes"),
        ('[[binding]]\nsubject = "a"\nrole = "viewer"\nname = "x"', "unknown keys: name"),
    ],
)
def test_a_policy_that_could_be_misread_is_refused(text: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        parse_policy(text, {"viewer"})


def test_the_role_of_a_nodes_own_services_is_bound_to_nobody(judge: Authorizer, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[[binding]]\nsubject = "spiffe://virtfleet.dev/user/ci"\nrole = "service"\n')
    with pytest.raises(PolicyError, match="unknown role `service`"):
        judge.load_policy(path)


def test_permissions_of_a_caller_are_listed(judge: Authorizer) -> None:
    listed = judge.permissions(Caller("x", ("viewer",)))
    assert listed == sorted(listed)
    assert "domains.get" in listed
    assert "domains.start" not in listed


def test_a_further_role_can_be_given() -> None:
    judge = Authorizer({"node": lambda permission: permission == "certificates.renew"})
    caller = Caller("x", ("node",))
    assert judge.prefixes(caller, "certificates.renew") == ()
    assert judge.prefixes(caller, "domains.get") is None


@pytest.mark.parametrize(
    ("before", "after", "narrows"),
    [
        ((), (), False),
        ((), ("operator",), False),
        (("operator",), (), True),
        (("operator",), ("viewer",), True),
        (("operator",), ("admin",), False),
        (("operator",), ("operator@nodes/n1/",), True),
        (("operator@nodes/n1/",), ("operator",), False),
        (("operator@nodes/n1/domains/a",), ("operator@nodes/n1/",), False),
        (("operator@nodes/n1/",), ("operator@nodes/n1/domains/a",), True),
        (("operator@nodes/n1/", "operator@nodes/n2/"), ("operator@nodes/n1/",), True),
    ],
)
def test_what_a_new_policy_takes(
    judge: Authorizer, before: tuple[str, ...], after: tuple[str, ...], *, narrows: bool
) -> None:
    assert judge.narrows(Caller("x", before), Caller("x", after), "domains.start") is narrows
