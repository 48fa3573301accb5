"""Holds what was said against what is. Pure: records and a snapshot of the truth in, findings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

LOST: Final = "LOST"
"""What was acknowledged is not so."""
TWICE: Final = "TWICE"
"""One change was done more than once."""
GUEST: Final = "GUEST"
"""A guest is lost, doubled, or runs for no domain."""
GAP: Final = "GAP"
"""A watcher was not told something, or was told all anew."""
ORDER: Final = "ORDER"
"""A watcher was told an older state after a newer one."""
UNSETTLED: Final = "UNSETTLED"
"""An operation still runs a minute after its service has come back."""
LEFT: Final = "LEFT"
"""Something on the host belongs to no resource."""
FAULT: Final = "FAULT"
"""A call failed in a way that the API does not allow."""

RESYNCING: Final = 3
_NO_FAULT: Final = frozenset(
    {"ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "CANCELLED", "FAILED_PRECONDITION"}
)
_REASONS: Final = frozenset({"HYPERVISOR_FAILED", "BACKEND_FAILED"})
"""What a killed process may make of a call that was under way, whatever the code."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Is something that should not be.

    Attributes:
        kind: One of the constants above.
        text: What, for people.
    """

    kind: str
    text: str


@dataclass(slots=True)
class Truth:
    """Is what is, read from outside where that can be.

    Attributes:
        domains: Name to (uid, generation, active), as the service keeps them.
        guests: How many processes run for each uid: from /proc.
        running_operations: Names of operations that have not ended.
        left: What the host has and no resource accounts for.
        killed_guests: The uids of guests that were killed on purpose.
    """

    domains: Mapping[str, tuple[str, int, bool]]
    guests: Counter[str] = field(default_factory=Counter)
    running_operations: Sequence[str] = ()
    left: Sequence[str] = ()
    killed_guests: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Domain:
    """Is what the writer knows of one domain."""

    uid: str = ""
    generation: int = 0
    exists: bool | None = False
    active: bool | None = False
    open_updates: int = 0
    """Changes that may have been done without an acknowledgement."""


def model(record: Iterable[Mapping[str, Any]]) -> tuple[dict[str, _Domain], list[Finding]]:
    """Return what must be so after what was acknowledged (None: not certain), and what cannot be in the record."""
    domains: dict[str, _Domain] = {}
    findings: list[Finding] = []
    for line in record:
        say = line["say"]
        if say == "end":
            continue
        one, what = domains.setdefault(line["name"], _Domain()), line["what"]
        if say == "intent":
            _intend(one, what)
        elif say == "ack":
            findings += _acknowledge(one, what, line)
        elif line["code"] not in _NO_FAULT and line["reason"] not in _REASONS:
            findings.append(
                Finding(FAULT, f"{what} {line['name']}: {line['code']} {line['reason']}: {line['message']}")
            )
    return domains, findings


def _intend(one: _Domain, what: str) -> None:
    if what in ("create", "delete"):
        one.exists = None
    if what in ("start", "stop", "delete"):
        one.active = None
    if what == "update":
        one.open_updates += 1


def _acknowledge(one: _Domain, what: str, line: Mapping[str, Any]) -> list[Finding]:
    name, generation = line["name"], line["generation"]
    if what == "create":
        one.uid, one.generation, one.exists = line["uid"], generation, True
        return []
    if what == "delete":
        one.exists, one.active = False, False
        return []
    one.exists = True
    if what in ("start", "stop"):
        one.active = what == "start"
        expected = range(one.generation, one.generation + one.open_updates + 1)
    else:
        # Those of before that nobody has answered may have been done too, but this one exactly once.
        expected = range(one.generation + 1, one.generation + one.open_updates + 1)
        one.open_updates = 0
    found = []
    if generation not in expected:
        found.append(
            Finding(TWICE, f"{what} {name}: generation {generation}, not {expected.start} to {expected.stop - 1}")
        )
    if line["uid"] != one.uid:
        found.append(Finding(LOST, f"{what} {name}: uid {line['uid']}, not {one.uid}"))
    one.generation = generation
    return found


def check(
    record: Iterable[Mapping[str, Any]], watches: Mapping[str, Sequence[Mapping[str, Any]]], truth: Truth
) -> list[Finding]:
    """Return everything that is not as it should be."""
    domains, findings = model(record)
    for name, one in domains.items():
        findings += _check_domain(name, one, truth)
    findings += _check_guests(truth)
    for watcher, lines in watches.items():
        findings += _check_watch(watcher, lines, domains, truth)
    findings += [Finding(UNSETTLED, name) for name in truth.running_operations]
    findings += [Finding(LEFT, what) for what in truth.left]
    return findings


def _check_domain(name: str, one: _Domain, truth: Truth) -> list[Finding]:
    there = truth.domains.get(name)
    if there is None:
        return [Finding(LOST, f"{name} was acknowledged and is not there")] if one.exists else []
    uid, generation, active = there
    if one.exists is False:
        return [Finding(LOST, f"{name} is there, and its end was acknowledged")]
    if not one.uid:
        return []
    found = []
    if uid != one.uid or not one.generation <= generation <= one.generation + one.open_updates:
        found.append(Finding(LOST, f"{name}: {uid} {generation}, acknowledged {one.uid} {one.generation}"))
    if one.active is not None and active != one.active and uid not in truth.killed_guests:
        found.append(Finding(LOST, f"{name}: active is {active}, acknowledged {one.active}"))
    return found


def _check_guests(truth: Truth) -> list[Finding]:
    wanted = {uid: name for name, (uid, _, active) in truth.domains.items() if active}
    found = [
        Finding(GUEST, f"{name} is active and has {truth.guests[uid]} processes")
        for uid, name in wanted.items()
        if truth.guests[uid] != 1
    ]
    found += [
        Finding(GUEST, f"a guest of {uid} runs for no active domain") for uid in truth.guests if uid not in wanted
    ]
    return found


def _told(watcher: str, lines: Sequence[Mapping[str, Any]], found: list[Finding]) -> dict[str, tuple[str, int]]:
    """Return what a watcher must believe to be there; an order that turned is a finding."""
    newest: dict[str, int] = {}
    known: dict[str, tuple[str, int]] = {}
    for line in lines:
        if line["kind"] == "put":
            uid, generation = line["uid"], line["generation"]
            if generation < newest.get(uid, 0):
                found.append(Finding(ORDER, f"{watcher}: {line['name']}: {generation} after {newest[uid]}"))
            newest[uid] = max(generation, newest.get(uid, 0))
            known[line["name"]] = (uid, generation)
        elif line["kind"] == "delete" and known.get(line["name"], ("", 0))[0] == line["uid"]:
            del known[line["name"]]
    return known


def _check_watch(
    watcher: str, lines: Sequence[Mapping[str, Any]], domains: Mapping[str, _Domain], truth: Truth
) -> list[Finding]:
    found: list[Finding] = []
    known = _told(watcher, lines, found)
    snapshots = sum(line["kind"] == "snapshot" for line in lines)
    if any(line["kind"] == "source" and line["state"] == RESYNCING for line in lines):
        found.append(Finding(GAP, f"{watcher}: a part was told anew"))
    if snapshots != 1:
        found.append(Finding(GAP, f"{watcher}: {snapshots} snapshots"))
    for name in domains:
        there = truth.domains.get(name)
        is_so = there[:2] if there is not None else None
        if known.get(name) != is_so:
            found.append(Finding(GAP, f"{watcher}: {name}: told {known.get(name)}, is {is_so}"))
    return found
