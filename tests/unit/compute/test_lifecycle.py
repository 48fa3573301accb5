"""The table of verbs and states: total, judged in one place, as the protos promise."""

from __future__ import annotations

import itertools

import pytest

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import lifecycle
from virtfleet_compute.lifecycle import Outcome, Verb
from virtfleet_service.errors import WrongState

State = domain_pb2.DomainState
Reason = domain_pb2.DomainStateReason

STATES = [value for value in State.values() if value != State.DOMAIN_STATE_UNSPECIFIED]


def domain(state: int, reason: int = Reason.DOMAIN_STATE_REASON_UNSPECIFIED) -> domain_pb2.Domain:
    made = domain_pb2.Domain(name="nodes/n1/domains/web")
    made.status.state = State.ValueType(state)
    made.status.state_reason = Reason.ValueType(reason)
    return made


def test_the_table_is_total() -> None:
    assert set(lifecycle.TABLE) == set(itertools.product(Verb, STATES))


@pytest.mark.parametrize("verb", Verb)
def test_every_refusal_names_the_state(verb: Verb) -> None:
    for state in STATES:
        if lifecycle.TABLE[verb, state] is Outcome.REFUSE:
            with pytest.raises(WrongState) as refused:
                lifecycle.judge(verb, domain(state))
            assert refused.value.metadata["state"] == State.Name(state).removeprefix("DOMAIN_STATE_")
        elif verb is not Verb.RESUME:
            assert lifecycle.judge(verb, domain(state)) is lifecycle.TABLE[verb, state]


def test_verbs_that_are_promised_to_succeed_again_do() -> None:
    """StartDomain, StopDomain, SuspendDomain and ResumeDomain say so in their protos."""
    for verb, states in (
        (Verb.START, (lifecycle.RUNNING, lifecycle.PAUSED)),
        (Verb.STOP, (lifecycle.SHUT_OFF, lifecycle.CRASHED)),
        (Verb.SUSPEND, (lifecycle.PAUSED,)),
        (Verb.RESUME, (lifecycle.RUNNING,)),
    ):
        for state in states:
            assert lifecycle.judge(verb, domain(state)) is Outcome.DONE


def test_reboot_and_reset_always_act() -> None:
    outcomes = {lifecycle.TABLE[verb, state] for verb in (Verb.REBOOT, Verb.RESET) for state in STATES}
    assert outcomes == {Outcome.ACT, Outcome.REFUSE}


def test_nothing_but_a_start_touches_what_does_not_run() -> None:
    for verb, state in lifecycle.TABLE:
        if state in lifecycle.INACTIVE and lifecycle.TABLE[verb, state] is Outcome.ACT:
            assert verb in (Verb.START, Verb.DELETE)


@pytest.mark.parametrize(
    "reason",
    [
        Reason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN,
        Reason.DOMAIN_STATE_REASON_GUEST_CRASHED,
        Reason.DOMAIN_STATE_REASON_GUEST_REBOOT_STOP,
    ],
)
def test_a_guest_that_has_ended_inside_is_not_resumed(reason: int) -> None:
    with pytest.raises(WrongState):
        lifecycle.judge(Verb.RESUME, domain(lifecycle.PAUSED, reason))
    paused = domain(lifecycle.PAUSED, Reason.DOMAIN_STATE_REASON_IO_ERROR)
    assert lifecycle.judge(Verb.RESUME, paused) is Outcome.ACT
