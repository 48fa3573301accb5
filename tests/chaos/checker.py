"""Holds what was said against what is. Pure: records and a snapshot of the truth in, findings out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

LOST: Final = "LOST"
"""What was acknowledged is not so."""
TWICE: Final = "TWICE"
"""One change was done more than once."""
GUEST: Final = "GUEST"
"""A guest or a daemon is lost, doubled, or runs for no resource."""
GAP: Final = "GAP"
"""A watcher was not told something, or was told all anew."""
ORDER: Final = "ORDER"
"""A watcher was told an older state after a newer one, or of one that was gone."""
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


@dataclass(frozen=True, slots=True)
class Resource:
    """Is a resource as its service keeps it.

    Attributes:
        uid: Its uid.
        generation: Its generation.
        active: Whether it runs; None for what does not run.
        parts: How many processes and bridges it must have now.
        capacity: The size of a volume, from the header of its file; 0 for others.
    """

    uid: str
    generation: int
    active: bool | None = None
    parts: int = 0
    capacity: int = 0


@dataclass(slots=True)
class Truth:
    """Is what is, read from outside where that can be.

    Attributes:
        resources: What the services have, by name.
        parts: How many guests, daemons and bridges there are for each uid: from /proc and the kernel's links.
        running_operations: Names of operations that have not ended.
        left: What the host has and no resource accounts for.
        killed_guests: The uids of guests that were killed on purpose.
    """

    resources: Mapping[str, Resource]
    parts: Mapping[str, int] = field(default_factory=dict)
    running_operations: Sequence[str] = ()
    left: Sequence[str] = ()
    killed_guests: frozenset[str] = frozenset()


@dataclass(slots=True)
class Known:
    """Is what the writer knows of one resource.

    Attributes:
        uid: Of its last creation that was acknowledged.
        generation: The last that was acknowledged.
        exists: Whether it is there; None: not certain.
        active: Whether it runs; None: not certain.
        capacity: The last that was acknowledged.
        open_updates: Changes that may have been done without an acknowledgement.
        steps: What each watcher must have been told of it.
    """

    uid: str = ""
    generation: int = 0
    exists: bool | None = False
    active: bool | None = False
    capacity: int = 0
    open_updates: int = 0
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """Is an acknowledged change as a watcher is told of it: in this order among those of its resource.

    Attributes:
        what: What was done.
        uid: To which incarnation.
        generation: What came out; 0: gone.
        active: Whether it runs since; None: not said.
    """

    what: str
    uid: str
    generation: int
    active: bool | None = None

    def is_told_by(self, line: Mapping[str, Any]) -> bool:
        """Tell whether a line of a watcher's record tells of it."""
        if line.get("uid") != self.uid:
            return False
        if self.what == "delete":
            return bool(line["kind"] == "delete")
        if line["kind"] != "put" or line["generation"] < self.generation:
            return False
        if self.active is not None:
            return line.get("active") == self.active
        return bool(line["generation"] == self.generation)


def model(record: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Known], list[Finding]]:
    """Return what must be so after what was acknowledged, and what cannot be in the record."""
    resources: dict[str, Known] = {}
    findings: list[Finding] = []
    for line in record:
        say = line["say"]
        if say == "end":
            continue
        one, what = resources.setdefault(line["name"], Known()), line["what"]
        if say == "intent":
            _intend(one, what)
        elif say == "ack":
            findings += _acknowledge(one, what, line)
        elif line["code"] not in _NO_FAULT and line["reason"] not in _REASONS:
            findings.append(
                Finding(FAULT, f"{what} {line['name']}: {line['code']} {line['reason']}: {line['message']}")
            )
    return resources, findings


def _intend(one: Known, what: str) -> None:
    if what in ("create", "delete"):
        one.exists = None
    if what in ("start", "stop", "delete"):
        one.active = None
    if what == "update":
        one.open_updates += 1


def _acknowledge(one: Known, what: str, line: Mapping[str, Any]) -> list[Finding]:
    name, generation = line["name"], line["generation"]
    if what == "create":
        one.uid, one.generation, one.exists, one.capacity = line["uid"], generation, True, line.get("capacity", 0)
        one.steps.append(Step(what, one.uid, generation))
        return []
    if what == "delete":
        one.exists, one.active = False, False
        if one.uid:
            one.steps.append(Step(what, one.uid, 0))
        return []
    one.exists = True
    if what in ("start", "stop"):
        one.active = what == "start"
        one.steps.append(Step(what, one.uid, one.generation, one.active))
        expected = range(one.generation, one.generation + one.open_updates + 1)
    else:
        # Those of before that nobody has answered may have been done too, but this one exactly once.
        one.steps.append(Step(what, one.uid, generation))
        expected = range(one.generation + 1, one.generation + one.open_updates + 1)
        one.open_updates, one.capacity = 0, line.get("capacity", 0)
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
    record: Iterable[Mapping[str, Any]],
    watches: Mapping[str, Sequence[Mapping[str, Any]]],
    truth: Truth,
    never_away: Collection[str] = (),
) -> list[Finding]:
    """Return everything that is not as it should be.

    Args:
        record: What the writer has said.
        watches: What each watcher was told.
        truth: What is.
        never_away: The watchers that have never been cut off: they must have been told of every single change.
    """
    resources, findings = model(record)
    for name, one in resources.items():
        findings += _check_resource(name, one, truth)
    findings += _check_parts(truth)
    for watcher, answers in watches.items():
        findings += _check_watch(watcher, answers, resources, truth, all_steps=watcher in never_away)
    findings += [Finding(UNSETTLED, name) for name in truth.running_operations]
    findings += [Finding(LEFT, what) for what in truth.left]
    return findings


def _check_resource(name: str, one: Known, truth: Truth) -> list[Finding]:
    there = truth.resources.get(name)
    if there is None:
        return [Finding(LOST, f"{name} was acknowledged and is not there")] if one.exists else []
    if one.exists is False:
        return [Finding(LOST, f"{name} is there, and its end was acknowledged")]
    if not one.uid:
        return []
    found = []
    generations = range(one.generation, one.generation + one.open_updates + 1)
    if there.uid != one.uid or there.generation not in generations:
        found.append(Finding(LOST, f"{name}: {there.uid} {there.generation}, acknowledged {one.uid} {one.generation}"))
    if there.active is not None and one.active not in (None, there.active) and there.uid not in truth.killed_guests:
        found.append(Finding(LOST, f"{name}: active is {there.active}, acknowledged {one.active}"))
    if not one.open_updates and there.capacity != one.capacity:
        found.append(Finding(LOST, f"{name}: the file has {there.capacity} bytes, acknowledged {one.capacity}"))
    return found


def _check_parts(truth: Truth) -> list[Finding]:
    wanted = {one.uid: (name, one.parts) for name, one in truth.resources.items() if one.parts}
    found = [
        Finding(GUEST, f"{name} must have {number} processes or bridges and has {truth.parts.get(uid, 0)}")
        for uid, (name, number) in wanted.items()
        if truth.parts.get(uid, 0) != number
    ]
    return found + [Finding(GUEST, f"{uid} has a process and does not run") for uid in truth.parts if uid not in wanted]


def _told(watcher: str, lines: Sequence[Mapping[str, Any]], found: list[Finding]) -> dict[str, tuple[Any, ...]]:
    """Return what a watcher must believe to be there; an order that turned is a finding."""
    newest: dict[str, int] = {}
    gone: set[str] = set()
    known: dict[str, tuple[Any, ...]] = {}
    for line in lines:
        if line["kind"] == "put":
            uid, generation = line["uid"], line["generation"]
            if uid in gone:
                found.append(Finding(ORDER, f"{watcher}: {line['name']}: {generation} after its end"))
            elif generation < newest.get(uid, 0):
                found.append(Finding(ORDER, f"{watcher}: {line['name']}: {generation} after {newest[uid]}"))
            newest[uid] = max(generation, newest.get(uid, 0))
            known[line["name"]] = (uid, generation, line.get("active"))
        elif line["kind"] == "delete":
            gone.add(line["uid"])
            if known.get(line["name"], ("",))[0] == line["uid"]:
                del known[line["name"]]
    return known


def _check_watch(
    watcher: str,
    answers: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Known],
    truth: Truth,
    *,
    all_steps: bool,
) -> list[Finding]:
    found: list[Finding] = []
    lines = [line for answer in answers for line in answer["told"]]
    known = _told(watcher, lines, found)
    if any(line["kind"] == "source" and line["state"] == RESYNCING for line in lines):
        found.append(Finding(GAP, f"{watcher}: a part was told anew"))
    for service in sorted({answer["service"] for answer in answers}) or ("no service",):
        snapshots = sum(
            line["kind"] == "snapshot" for answer in answers if answer["service"] == service for line in answer["told"]
        )
        if snapshots != 1:
            found.append(Finding(GAP, f"{watcher}: {snapshots} snapshots of {service}"))
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(line.get("name", ""), []).append(line)
    for name, one in resources.items():
        there = truth.resources.get(name)
        is_so = (there.uid, there.generation, there.active) if there is not None else None
        if known.get(name) != is_so:
            found.append(Finding(GAP, f"{watcher}: {name}: told {known.get(name)}, is {is_so}"))
        # Whoever died on purpose had been told inactive before it was stopped.
        steps = [step for step in one.steps if step.active is None or step.uid not in truth.killed_guests]
        missed = _missed(steps, by_name.get(name, []), all_steps=all_steps)
        if missed is not None:
            found.append(Finding(GAP, f"{watcher}: {name}: was not told of {missed}"))
    return found


def _missed(steps: Sequence[Step], lines: Sequence[Mapping[str, Any]], *, all_steps: bool) -> Step | None:
    """Return the first step that a watcher should have been told of, behind the one before it, and was not.

    Whoever is behind need not be told of a put that a later put of the same resource has overtaken: of its beginning
    and its end he must be.
    """
    rest = iter(lines)
    for step in steps:
        if all_steps:
            told = any(step.is_told_by(line) for line in rest)
        else:
            wanted = {"create": "put", "delete": "delete"}.get(step.what)
            told = wanted is None or any(line["kind"] == wanted and line["uid"] == step.uid for line in rest)
        if not told:
            return step
    return None
