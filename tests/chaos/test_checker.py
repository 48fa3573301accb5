"""The checker, against records that are right and records that are wrong in one way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos import checker
from tests.chaos.checker import Resource, Truth, check

NAME = "nodes/n1/domains/a"
VOLUME = "nodes/n1/pools/p/volumes/v"
Line = dict[str, Any]


def said(
    what: str, generation: int = 1, uid: str = "U", name: str = NAME, content: str = "", seconds: float = 10.0
) -> list[Line]:
    line = {"what": what, "name": name}
    answer = {"uid": uid, "generation": generation, "content": content}
    return [
        {"say": "intent", **line, "time": seconds},
        {"say": "ack", **line, **answer, "time": seconds + 1},
    ]


def failed(code: str, reason: str, what: str = "stop", seconds: float = 10.0) -> list[Line]:
    intent = {"say": "intent", "what": what, "name": NAME, "time": seconds}
    return [intent, {**intent, "say": "failed", "code": code, "reason": reason, "message": ""}]


def put(generation: int, *, active: bool | None = True, uid: str = "U", name: str = NAME) -> Line:
    return {"kind": "put", "name": name, "uid": uid, "generation": generation, "active": active}


def found(
    record: list[Line], watch: Sequence[Line], truth: Truth, *, away: bool = False, service: str = "compute"
) -> set[str]:
    answers = [{"service": service, "told": [line], "token": f"t{number}"} for number, line in enumerate(watch)]
    return {finding.kind for finding in check(record, {"w": answers}, truth, () if away else ("w",))}


SNAPSHOT = {"kind": "snapshot"}
END = {"kind": "delete", "name": NAME, "uid": "U"}
LIFE = [*said("create"), *said("start"), *said("update", 2)]
WATCH = [SNAPSHOT, put(1, active=False), put(1), put(2)]
HERE = Resource("U", 2, active=True, parts=1)
THERE = Truth({NAME: HERE}, {"U": 1})


def test_what_is_right_has_no_findings() -> None:
    assert not found(LIFE, WATCH, THERE)
    gone = [*LIFE, *said("stop", 2), *said("delete", 0, uid="")]
    assert not found(gone, [*WATCH, put(2, active=False), END], Truth({}))


def test_one_that_was_made_again_is_another() -> None:
    again = [*LIFE, *said("stop", 2), *said("delete", 0, uid=""), *said("create", uid="V")]
    watch = [*WATCH, put(2, active=False), END, put(1, active=False, uid="V")]
    assert not found(again, watch, Truth({NAME: Resource("V", 1, active=False)}))
    assert found(again, watch, THERE) == {checker.LOST, checker.GAP}


def test_what_was_not_acknowledged_may_be_or_not() -> None:
    cut = [*said("create"), {"say": "intent", "what": "update", "name": NAME, "time": 1.0}]
    for generation in (1, 2):
        truth = Truth({NAME: Resource("U", generation, active=False)})
        told = [put(number, active=False) for number in range(1, generation + 1)]
        assert not found(cut, [SNAPSHOT, *told], truth)
    begun = [{"say": "intent", "what": "create", "name": NAME, "time": 1.0}]
    assert not found(begun, [SNAPSHOT], Truth({}))
    assert not found([*LIFE, *failed("UNAVAILABLE", "NODE_AWAY")], WATCH, THERE)


@pytest.mark.parametrize(
    ("record", "watch", "truth", "kinds"),
    [
        pytest.param(LIFE, [*WATCH, END], Truth({}), {checker.LOST}, id="a resource is gone"),
        pytest.param(
            LIFE,
            WATCH,
            Truth({NAME: replace(HERE, generation=1)}, {"U": 1}),
            {checker.LOST, checker.GAP},
            id="an update is gone, and a watcher was told of it",
        ),
        pytest.param(
            LIFE,
            [*WATCH, put(2, active=False)],
            Truth({NAME: Resource("U", 2, active=False)}),
            {checker.LOST},
            id="a start is gone",
        ),
        pytest.param([*LIFE, *said("delete", 0)], [*WATCH, END], THERE, {checker.LOST, checker.GAP}, id="it is back"),
        pytest.param(
            [*LIFE, *said("update", 4)],
            [*WATCH, put(3), put(4)],
            Truth({NAME: replace(HERE, generation=4)}, {"U": 1}),
            {checker.TWICE},
            id="an update was done twice",
        ),
        pytest.param(LIFE, WATCH, Truth({NAME: HERE}, {"U": 2}), {checker.GUEST}, id="a guest is doubled"),
        pytest.param(LIFE, WATCH, Truth({NAME: HERE}), {checker.GUEST}, id="a guest is lost"),
        pytest.param(LIFE, WATCH, Truth({NAME: HERE}, {"U": 1, "V": 1}), {checker.GUEST}, id="a guest is nobody's"),
        pytest.param(LIFE, WATCH[:-1], THERE, {checker.GAP}, id="the last state was not told"),
        pytest.param(
            LIFE, [SNAPSHOT, put(1, active=False), put(2)], THERE, {checker.GAP}, id="a state between was not told"
        ),
        pytest.param(
            [*LIFE, *said("update", 3)],
            [*WATCH, put(4)],
            Truth({NAME: replace(HERE, generation=4)}, {"U": 1}),
            {checker.GAP, checker.LOST},
            id="an update was not told",
        ),
        pytest.param(
            [*LIFE, *said("stop", 2), *said("delete", 0)],
            [*WATCH, put(2, active=False)],
            Truth({}),
            {checker.GAP},
            id="an end was not told",
        ),
        pytest.param(LIFE, [*WATCH, SNAPSHOT], THERE, {checker.GAP}, id="all was told anew"),
        pytest.param(
            LIFE,
            [*WATCH, {"kind": "source", "state": checker.RESYNCING}],
            THERE,
            {checker.GAP},
            id="a node was told anew",
        ),
        pytest.param(LIFE, [*WATCH, put(1), put(2)], THERE, {checker.ORDER}, id="an older state behind a newer one"),
        pytest.param(
            [*LIFE, *said("delete", 0)],
            [*WATCH, END, put(2), END],
            Truth({}),
            {checker.ORDER},
            id="a state behind the end",
        ),
        pytest.param(LIFE, WATCH, Truth({NAME: HERE}, {"U": 1}, ["op"]), {checker.UNSETTLED}, id="an operation runs"),
        pytest.param(LIFE, WATCH, Truth({NAME: HERE}, {"U": 1}, [], ["vp-1"]), {checker.LEFT}, id="a tap is left"),
        pytest.param([*LIFE, *failed("INTERNAL", "UNEXPECTED")], WATCH, THERE, {checker.FAULT}, id="a fault"),
        pytest.param([*LIFE, *failed("TIMEOUT", "")], WATCH, THERE, {checker.FAULT}, id="no answer in a minute"),
    ],
)
def test_what_is_wrong_is_named(record: list[Line], watch: list[Line], truth: Truth, kinds: set[str]) -> None:
    assert found(record, watch, truth) == kinds


@pytest.mark.parametrize("what", ["create", "delete"])
def test_a_change_is_known_again(what: str) -> None:
    """A service that has forgotten a request takes its repetition for another change, and refuses it."""
    before = said("create") if what == "delete" else []
    watch = [SNAPSHOT, put(1, active=False), *([END] if what == "delete" else [])]
    truth = Truth({} if what == "delete" else {NAME: Resource("U", 1, active=False)})
    refusal = (
        failed("NOT_FOUND", "RESOURCE_NOT_FOUND", what) if before else failed("ALREADY_EXISTS", "RESOURCE_EXISTS", what)
    )
    assert found([*before, *refusal], watch, truth) == {checker.TWICE}
    # One that failed before may have had its effect all the same.
    assert not found([*before, *failed("ABORTED", "CHANGE_ROLLED_BACK", what), *refusal], watch, truth)


def test_a_watcher_that_was_away_may_miss_what_was_overtaken() -> None:
    assert not found(LIFE, [SNAPSHOT, put(2)], THERE, away=True)
    gone = [*LIFE, *said("stop", 2), *said("delete", 0)]
    assert not found(gone, [SNAPSHOT, put(2, active=False), END], Truth({}), away=True)
    assert found(gone, [SNAPSHOT], Truth({}), away=True) == {checker.GAP}
    assert found(gone, [SNAPSHOT, END], Truth({}), away=True) == {checker.GAP}
    assert found(gone, [SNAPSHOT, put(2)], Truth({}), away=True) == {checker.GAP}


def test_a_file_must_hold_what_was_acknowledged() -> None:
    record = [*said("create", name=VOLUME, content="4 bytes"), *said("update", 2, name=VOLUME, content="sha256:5")]
    watch = [SNAPSHOT, put(1, active=None, name=VOLUME), put(2, active=None, name=VOLUME)]
    for content, kinds in (("sha256:5", set()), ("4 bytes", {checker.LOST}), ("sha256:6", {checker.LOST})):
        truth = Truth({VOLUME: Resource("U", 2, content=content)})
        assert found(record, watch, truth, service="storage") == kinds


@pytest.mark.parametrize(("born", "kinds"), [(10.5, set()), (9.0, {checker.GUEST}), (12.0, {checker.GUEST})])
def test_the_process_of_a_guest_is_that_of_the_start_that_was_acknowledged(born: float, kinds: set[str]) -> None:
    """Whoever loses a guest and starts another in its place has as many processes as before."""
    truth = Truth({NAME: replace(HERE, born=born)}, {"U": 1})
    assert found(LIFE, WATCH, truth) == kinds
    # A start that failed may have had its effect: the guest is as old as the first try.
    again = [*said("create"), *failed("ABORTED", "", "start", 5.0), *said("start"), *said("update", 2)]
    assert found(again, WATCH, replace(truth, resources={NAME: replace(HERE, born=6.0)})) == set()


def test_a_certificate_is_issued_once() -> None:
    user, watch = "users/eve", [SNAPSHOT, put(1, active=None, uid="C", name="users/eve")]
    truth = Truth({user: Resource("C", 1)}, doubled=frozenset({user}))
    once = said("create", uid="C", name=user)
    assert found(once, watch, truth, service="fleet") == {checker.TWICE}
    twice = [{"say": "intent", "what": "create", "name": user, "time": 1.0}, *once]
    assert found(twice, watch, truth, service="fleet") == set(), "one that was not acknowledged may be there too"


def test_the_list_of_the_fleet_is_what_the_stores_have() -> None:
    assert not found(LIFE, WATCH, replace(THERE, listed={NAME: ("U", 2)}))
    for listed in ({NAME: ("U", 1)}, {}, {NAME: ("U", 2), "nodes/n1/domains/b": ("V", 1)}):
        assert found(LIFE, WATCH, replace(THERE, listed=listed)) == {checker.GAP}


def test_the_disk_of_a_domain_goes_with_it() -> None:
    disk = "nodes/n1/pools/p/volumes/a"
    gone = [*LIFE, *said("stop", 2), *said("delete", 0, uid="")]
    watch = [*WATCH, put(2, active=False), END]
    assert found(gone, watch, Truth({disk: Resource("V", 1)})) == {checker.LEFT}
    assert not found(LIFE, WATCH, replace(THERE, resources={NAME: HERE, disk: Resource("V", 1)}))
    assert not found(gone, watch, Truth({VOLUME: Resource("V", 1)})), "it is nobody's that was made here"


def test_what_is_told_again_after_a_break_is_told_once() -> None:
    """The parts of a large answer have the token of before: a break within them tells them again."""

    def answer(token: str, *told: Line) -> Line:
        return {"service": "compute", "told": list(told), "token": token}

    cut = {"service": "compute", "told": [], "token": "", "cut": True}
    story = [answer("t0", SNAPSHOT), answer("t0", put(1, active=False), put(1)), cut]
    whole = [*story, answer("t0", put(1, active=False), put(1)), answer("t1", put(2))]
    assert not check(LIFE, {"w": whole}, THERE, ("w",))
    back = [*story, answer("t1", put(2)), answer("t1", put(1)), answer("t2", put(2))]
    assert {one.kind for one in check(LIFE, {"w": back}, THERE, ("w",))} == {checker.ORDER, checker.GAP}
    # What comes after a break must tell again all that was behind the token.
    lost = [*story, answer("t1", put(2))]
    assert {one.kind for one in check(LIFE, {"w": lost}, THERE, ("w",))} == {checker.GAP}


def test_what_was_to_cost_no_call_has_cost_none() -> None:
    answers = [{"service": "compute", "told": [line], "token": "t"} for line in WATCH]
    assert not check(LIFE, {"w": answers}, THERE, faultless=True)
    for line in ({"say": "again", "code": "UNAVAILABLE", "reason": ""}, failed("UNAVAILABLE", "")[1]):
        seen = check([*LIFE, line], {"w": answers}, THERE, faultless=True)
        assert [one.kind for one in seen] == [checker.FAULT]
        assert not check([*LIFE, line], {"w": answers}, THERE)


def test_a_guest_that_was_killed_on_purpose_is_not_lost() -> None:
    watch = [SNAPSHOT, put(1, active=False), put(1), put(1, active=False), put(2, active=False)]
    truth = Truth({NAME: Resource("U", 2, active=False)}, killed_guests=frozenset({"U"}))
    assert not found([*LIFE, *said("stop", 2)], watch, truth)
