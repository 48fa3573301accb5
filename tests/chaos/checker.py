"""Holds what was said against what is. Pure: records and a snapshot of the truth in, findings out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

LOST: Final = "LOST"
"""What was acknowledged is not so."""
TWICE: Final = "TWICE"
"""One change was done more than once, or its repetition was taken for another one."""
GUEST: Final = "GUEST"
"""A guest or a daemon is lost, doubled, another one than was started, or runs for no resource."""
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
COLLECTIONS: Final = {
    "domains": "compute",
    "volumes": "storage",
    "pools": "storage",
    "networks": "network",
    "ports": "network",
    "joinTokens": "fleet",
    "users": "fleet",
}
"""Whose watch tells of a resource, by the collection in its name; `users` stand for the certificates that they were given."""
_NO_FAULT: Final = frozenset(
    {"ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "CANCELLED", "FAILED_PRECONDITION"}
)
CLOCK_SECONDS: Final = 0.1
"""How far the clock of the record and the kernel's, which counts in hundredths, may be apart."""
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
        parts: How many processes, bridges and marks it must have now.
        content: What is in the file of a volume: its size or its digest, as the writer tells it; empty for others.
        born: When the process of a guest began, in seconds as `time.time()`; 0: it has none.
    """

    uid: str
    generation: int
    active: bool | None = None
    parts: int = 0
    content: str = ""
    born: float = 0.0


@dataclass(slots=True)
class Truth:
    """Is what is, read from outside where that can be.

    Attributes:
        resources: What the services have, by name.
        parts: How many guests, daemons, bridges and marks there are for each uid: from /proc, the kernel's links and
            the files.
        running_operations: Names of operations that have not ended.
        left: What the host has and no resource accounts for.
        killed_guests: The uids of guests that were killed on purpose.
        doubled: The names under which there are two of what there may be one.
        listed: What the gateway lists of all nodes: uid and generation by name; None: nobody has asked.
    """

    resources: Mapping[str, Resource]
    parts: Mapping[str, int] = field(default_factory=dict)
    running_operations: Sequence[str] = ()
    left: Sequence[str] = ()
    killed_guests: frozenset[str] = frozenset()
    doubled: frozenset[str] = frozenset()
    listed: Mapping[str, tuple[str, int]] | None = None


@dataclass(slots=True)
class Known:
    """Is what the writer knows of one resource.

    Attributes:
        uid: Of its last creation that was acknowledged.
        generation: The last that was acknowledged.
        exists: Whether it is there; None: not certain.
        active: Whether it runs; None: not certain.
        content: The last that was acknowledged.
        open_updates: Changes that may have been done without an acknowledgement.
        creations: How often it was to be made.
        deletions: How often it was to be deleted, since it was made.
        start_seconds: When its start was first asked for, since it stood still.
        born: Between when its process must have begun, by the start that was acknowledged last; None: not certain.
        steps: What each watcher must have been told of it.
    """

    uid: str = ""
    generation: int = 0
    exists: bool | None = False
    active: bool | None = False
    content: str = ""
    open_updates: int = 0
    creations: int = 0
    deletions: int = 0
    start_seconds: float = 0.0
    born: tuple[float, float] | None = None
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
        if say in ("end", "again"):
            continue
        one, what = resources.setdefault(line["name"], Known()), line["what"]
        if say == "intent":
            _intend(one, what, line["time"])
        elif say == "ack":
            findings += _acknowledge(one, what, line)
        elif _is_its_own_repetition(one, what, line):
            findings.append(Finding(TWICE, f"{what} {line['name']}: its own repetition is told {line['reason']}"))
        elif line["code"] not in _NO_FAULT and line["reason"] not in _REASONS:
            findings.append(
                Finding(FAULT, f"{what} {line['name']}: {line['code']} {line['reason']}: {line['message']}")
            )
    return resources, findings


def _is_its_own_repetition(one: Known, what: str, line: Mapping[str, Any]) -> bool:
    """Tell whether a change is refused for what nobody but itself can have done.

    A lost answer is asked for again with the same request_id: to a service that has forgotten it, that is a second change.
    """
    if what == "create":
        # The secret of a token is told once: who has lost that is told so.
        is_first = one.creations == 1 and not line["name"].startswith("joinTokens/")
        return is_first and bool(line["reason"] == "RESOURCE_EXISTS")
    return what == "delete" and one.deletions == 1 and bool(line["reason"] == "RESOURCE_NOT_FOUND")


def _intend(one: Known, what: str, seconds: float) -> None:
    if what in ("create", "delete"):
        one.exists = None
    if what in ("start", "stop", "delete"):
        one.active = None
    if what == "create":
        one.creations += 1
    if what == "delete":
        one.deletions += 1
    if what == "start":
        one.start_seconds = one.start_seconds or seconds
    elif what != "update":
        one.start_seconds, one.born = 0.0, None
    if what == "update":
        one.open_updates += 1


def _acknowledge(one: Known, what: str, line: Mapping[str, Any]) -> list[Finding]:
    name, generation = line["name"], line["generation"]
    if what == "create":
        one.uid, one.generation, one.exists, one.content = line["uid"], generation, True, line.get("content", "")
        one.deletions = 0
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
        one.born = (one.start_seconds, line["time"]) if one.active else None
        one.steps.append(Step(what, one.uid, one.generation, one.active))
        expected = range(one.generation, one.generation + one.open_updates + 1)
    else:
        # Those of before that nobody has answered may have been done too, but this one exactly once.
        one.steps.append(Step(what, one.uid, generation))
        expected = range(one.generation + 1, one.generation + one.open_updates + 1)
        one.open_updates, one.content = 0, line.get("content", "")
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
    *,
    faultless: bool = False,
) -> list[Finding]:
    """Return everything that is not as it should be.

    Args:
        record: What the writer has said.
        watches: What each watcher was told.
        truth: What is.
        never_away: The watchers that have never been cut off and never fell behind: they must have been told of every
            single change.
        faultless: Whether no call may have failed or been made again: nothing has happened that costs one.
    """
    record = list(record)
    resources, findings = model(record)
    if faultless:
        findings += [
            Finding(FAULT, f"was to cost no call: {line}") for line in record if line["say"] in ("failed", "again")
        ]
    for name, one in resources.items():
        findings += _check_resource(name, one, truth)
    findings += _check_parts(truth)
    findings += _check_list(truth)
    findings += _check_disks(resources, truth)
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
    if not one.open_updates and there.content != one.content:
        found.append(Finding(LOST, f"{name}: the file has {there.content}, acknowledged {one.content}"))
    if name in truth.doubled and one.creations == 1:
        found.append(Finding(TWICE, f"{name} was to be made once and is there twice"))
    if one.born is not None and there.active and there.born and there.uid not in truth.killed_guests:
        first, last = one.born
        if not first - CLOCK_SECONDS <= there.born <= last + CLOCK_SECONDS:
            found.append(
                Finding(
                    GUEST,
                    f"{name}: its process began at {there.born:.2f}, its start was from {first:.2f} to {last:.2f}",
                )
            )
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


def _check_list(truth: Truth) -> list[Finding]:
    """Hold the gateway's list, which comes out of what it was told, against the services' stores."""
    if truth.listed is None:
        return []
    stored = {
        name: (one.uid, one.generation)
        for name, one in truth.resources.items()
        if name.split("/")[-2] in ("domains", "volumes", "pools", "networks")
    }
    return [
        Finding(GAP, f"the list of the fleet has {name} as {truth.listed.get(name)}, it is {stored.get(name)}")
        for name in sorted(stored.keys() | truth.listed.keys())
        if stored.get(name) != truth.listed.get(name)
    ]


def _check_disks(resources: Mapping[str, Known], truth: Truth) -> list[Finding]:
    """Find the volumes that were made with a domain, whose id they have, and that have outlived it."""
    found = []
    for name in truth.resources:
        node, _, volume = name.partition("/pools/")
        domain = f"{node}/domains/{volume.rpartition('/')[2]}"
        if "/volumes/" in name and name not in resources and domain in resources and domain not in truth.resources:
            found.append(Finding(LEFT, f"{name} is of {domain}, which is not there"))
    return found


def _story(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what was told, without what is told again after a break: all behind the token that was resumed with.

    An answer that came in parts has the token of before in all but its last: a watch promises each change at least once.
    """
    kept: list[Mapping[str, Any]] = []
    for answer in answers:
        if not answer.get("cut"):
            kept.append(answer)
            continue
        own = [
            (place, one["token"])
            for place, one in enumerate(kept)
            if one["service"] == answer["service"] and one["token"]
        ]
        if own:
            first = next(place for place, token in own if token == own[-1][1])
            kept = [one for place, one in enumerate(kept) if place <= first or one["service"] != answer["service"]]
    return kept


def _check_watch(
    watcher: str,
    answers: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Known],
    truth: Truth,
    *,
    all_steps: bool,
) -> list[Finding]:
    found: list[Finding] = []
    answers = _story(answers)
    lines = [line for answer in answers for line in answer["told"]]
    known = _told(watcher, lines, found)
    if any(line["kind"] == "source" and line["state"] == RESYNCING for line in lines):
        found.append(Finding(GAP, f"{watcher}: a part was told anew"))
    services = {answer["service"] for answer in answers}
    for service in sorted(services) or ("no service",):
        snapshots = sum(
            line["kind"] == "snapshot" for answer in answers if answer["service"] == service for line in answer["told"]
        )
        if snapshots != 1:
            found.append(Finding(GAP, f"{watcher}: {snapshots} snapshots of {service}"))
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(line.get("name", ""), []).append(line)
    for name, one in resources.items():
        if COLLECTIONS[name.split("/")[-2]] not in services:
            continue
        there = truth.resources.get(name)
        is_so = (there.uid, there.generation, there.active) if there is not None else None
        if known.get(name) != is_so:
            found.append(Finding(GAP, f"{watcher}: {name}: told {known.get(name)}, is {is_so}"))
        # Whoever died on purpose had been told inactive before it was stopped.
        steps = [step for step in one.steps if step.active is None or step.uid not in truth.killed_guests]
        if name.startswith("users/") and not all_steps:
            # A revocation is a put of the certificate, which overtakes that of its issue.
            steps = [step for step in steps if step.what != "create"]
        missed = _missed(steps, by_name.get(name, []), all_steps=all_steps)
        if missed is not None:
            found.append(Finding(GAP, f"{watcher}: {name}: was not told of {missed}"))
    return found


def _missed(steps: Sequence[Step], lines: Sequence[Mapping[str, Any]], *, all_steps: bool) -> Step | None:
    """Return the first step that a watcher should have been told of, behind the one before it, and was not.

    Whoever is behind, by a break or because others have the processor, need not be told of a put that a later put of the
    same resource has overtaken: of its beginning and its end he must be.
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
