from __future__ import annotations

import uuid

import pytest

from tests.unit.service.rig import domain
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import errors, resources
from virtfleet_service.views import BASIC, FULL, apply_view


def test_a_new_head_is_whole() -> None:
    made = domain_pb2.Domain(display_name="Web")
    resources.create_head(made, "nodes/n1/domains/a")
    assert made.name == "nodes/n1/domains/a"
    assert uuid.UUID(made.uid).version == 4
    assert made.generation == 1
    assert made.create_time == made.update_time
    assert made.display_name == "Web"
    given = domain_pb2.Domain()
    resources.create_head(given, "nodes/n1/domains/b", uid="u")
    assert given.uid == "u"


def test_the_etag_follows_the_generation_and_never_the_status() -> None:
    made = domain("a")
    etag = made.etag
    made.status.state = domain_pb2.DOMAIN_STATE_RUNNING
    assert resources.etag_of(made) == etag
    resources.touch(made)
    assert made.generation == 2
    assert made.etag != etag
    assert domain("a").etag != etag


def test_preconditions() -> None:
    made = domain("a")
    resources.check_preconditions(made)
    resources.check_preconditions(made, made.etag, made.uid)
    with pytest.raises(errors.EtagMismatch) as etag:
        resources.check_preconditions(made, "old")
    assert etag.value.metadata["etag"] == made.etag
    with pytest.raises(errors.UidMismatch) as uid:
        resources.check_preconditions(made, "old", "other")
    assert uid.value.metadata["uid"] == made.uid
    assert uid.value.resource == made.name


def test_conditions_keep_the_time_of_their_last_transition() -> None:
    conditions = domain("a").status.conditions
    assert resources.set_condition(conditions, "Drifted", reason="X", message="one")
    first = conditions[0].last_transition_time.ToNanoseconds()
    assert not resources.set_condition(conditions, "Drifted", reason="X", message="one")
    assert resources.set_condition(conditions, "Drifted", reason="Y", message="two")
    assert conditions[0].last_transition_time.ToNanoseconds() == first
    assert resources.set_condition(conditions, "Drifted", holds=None)
    assert conditions[0].last_transition_time.ToNanoseconds() > first
    assert resources.get_condition(conditions, "Drifted") == conditions[0]
    assert resources.clear_condition(conditions, "Drifted")
    assert not resources.clear_condition(conditions, "Drifted")
    assert len(conditions) == 0


def test_views_leave_the_message_as_it_is() -> None:
    made = domain("a")
    basic = apply_view(made, BASIC)
    assert not basic.HasField("spec")
    assert basic.status.state == made.status.state
    assert made.HasField("spec")
    assert made.status.HasField("active_spec")
    assert apply_view(made, FULL) is made
    assert apply_view(made, 0) is made
