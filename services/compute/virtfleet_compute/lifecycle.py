"""What each verb does in each state: the one table, and the only judge of it.

The table says what a call may do. What a guest does by itself is observed and never judged: the host is the truth about
what runs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from virtfleet.compute.v1 import domain_pb2
from virtfleet_service.errors import WrongState

State = domain_pb2.DomainState
Reason = domain_pb2.DomainStateReason

RUNNING: Final = State.DOMAIN_STATE_RUNNING
BLOCKED: Final = State.DOMAIN_STATE_BLOCKED
PAUSED: Final = State.DOMAIN_STATE_PAUSED
SHUTTING_DOWN: Final = State.DOMAIN_STATE_SHUTTING_DOWN
SHUT_OFF: Final = State.DOMAIN_STATE_SHUT_OFF
CRASHED: Final = State.DOMAIN_STATE_CRASHED
SLEEPING: Final = State.DOMAIN_STATE_SLEEPING
UNKNOWN: Final = State.DOMAIN_STATE_UNKNOWN

INACTIVE: Final = frozenset({SHUT_OFF, CRASHED})
"""The states without a guest."""


class Verb(enum.Enum):
    """Names what a call asks of a domain; the value says it in a sentence."""

    START = "started"
    STOP = "stopped"
    REBOOT = "rebooted"
    RESET = "reset"
    SUSPEND = "suspended"
    RESUME = "resumed"
    DELETE = "deleted"
    UPDATE_LIVE = "changed while it runs"
    OPEN_CONSOLE = "opened a console of"


class Outcome(enum.Enum):
    """Says what a verb does in a state."""

    ACT = "act"
    """The driver is called."""
    DONE = "done"
    """The domain is already as asked; the call succeeds without any effect."""
    REFUSE = "refuse"
    """WRONG_STATE."""


_A, _D, _R = Outcome.ACT, Outcome.DONE, Outcome.REFUSE

_COLUMNS: Final = (RUNNING, BLOCKED, PAUSED, SHUTTING_DOWN, SHUT_OFF, CRASHED, SLEEPING, UNKNOWN)

_ROWS: Final[Mapping[Verb, tuple[Outcome, ...]]] = {
    #                   RUN BLK PAU SHD OFF CRA SLP UNK
    Verb.START: (_D, _D, _D, _R, _A, _A, _D, _R),
    Verb.STOP: (_A, _A, _A, _A, _D, _D, _A, _A),
    Verb.REBOOT: (_A, _A, _R, _R, _R, _R, _R, _R),
    Verb.RESET: (_A, _A, _A, _A, _R, _R, _A, _R),
    Verb.SUSPEND: (_A, _A, _D, _R, _R, _R, _R, _R),
    Verb.RESUME: (_D, _D, _A, _R, _R, _R, _R, _R),
    Verb.DELETE: (_R, _R, _R, _R, _A, _A, _R, _R),
    Verb.UPDATE_LIVE: (_A, _A, _A, _R, _R, _R, _R, _R),
    Verb.OPEN_CONSOLE: (_A, _A, _A, _A, _R, _R, _A, _R),
}

TABLE: Final[Mapping[tuple[Verb, int], Outcome]] = {
    (verb, state): outcome for verb, row in _ROWS.items() for state, outcome in zip(_COLUMNS, row, strict=True)
}
"""What each verb does in each state. Total: every verb has an entry for every state that is ever stored."""

_GUEST_ENDED_INSIDE: Final = frozenset(
    {
        Reason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN,
        Reason.DOMAIN_STATE_REASON_GUEST_CRASHED,
        Reason.DOMAIN_STATE_REASON_GUEST_REBOOT_STOP,
    }
)
"""Reasons for which a paused guest has nothing left to go on with (`on_exit` PRESERVE)."""


def active(state: int) -> bool:
    """Tell whether a domain in this state has a guest."""
    return state not in INACTIVE


def judge(verb: Verb, domain: domain_pb2.Domain) -> Outcome:
    """Say what a verb does to a domain in its present state.

    Returns:
        ACT or DONE.

    Raises:
        WrongState: The verb means nothing in this state.
    """
    status = domain.status
    outcome = TABLE[verb, status.state]
    if verb is Verb.RESUME and outcome is _A and status.state_reason in _GUEST_ENDED_INSIDE:
        outcome = _R
    if outcome is _R:
        state = State.Name(status.state).removeprefix("DOMAIN_STATE_")
        reason = Reason.Name(status.state_reason).removeprefix("DOMAIN_STATE_REASON_")
        raise WrongState(
            f"{domain.name} is {state} ({reason}) and cannot be {verb.value}",
            resource=domain.name,
            state=state,
            state_reason=reason,
        )
    return outcome
