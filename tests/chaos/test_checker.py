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


def said(what: str, generation: int = 1, uid: str = "U", name: str = NAME, capacity: int = 0) -> list[Line]:
    return [
        {"say": "intent", "what": what, "name": name},
        {"say": "ack", "what": what, "name": name, "uid": uid, "generation": generation, "capacity": capacity},
    ]


def failed(code: str, reason: str) -> list[Line]:
    intent = {"say": "intent", "what": "stop", "name": NAME}
    return [intent, {**intent, "say": "failed", "code": code, "reason": reason, "message": ""}]


def put(generation: int, *, active: bool | None = True, uid: str = "U", name: str = NAME) -> Line:
    return {"kind": "put", "name": name, "uid": uid, "generation": generation, "active": active}


def found(record: list[Line], watch: Sequence[Line], truth: Truth, *, away: bool = False) -> set[str]:
    answers = [{"service": "compute", "told": [line], "token": "t"} for line in watch]
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
    cut = [*said("create"), {"say": "intent", "what": "update", "name": NAME}]
    for generation in (1, 2):
        truth = Truth({NAME: Resource("U", generation, active=False)})
        told = [put(number, active=False) for number in range(1, generation + 1)]
        assert not found(cut, [SNAPSHOT, *told], truth)
    begun = [{"say": "intent", "what": "create", "name": NAME}]
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


def test_a_watcher_that_was_away_may_miss_what_was_overtaken() -> None:
    assert not found(LIFE, [SNAPSHOT, put(2)], THERE, away=True)
    gone = [*LIFE, *said("stop", 2), *said("delete", 0)]
    assert not found(gone, [SNAPSHOT, put(2, active=False), END], Truth({}), away=True)
    assert found(gone, [SNAPSHOT], Truth({}), away=True) == {checker.GAP}
    assert found(gone, [SNAPSHOT, END], Truth({}), away=True) == {checker.GAP}
    assert found(gone, [SNAPSHOT, put(2)], Truth({}), away=True) == {checker.GAP}


def test_a_file_must_be_as_large_as_was_acknowledged() -> None:
    record = [*said("create", name=VOLUME, capacity=4), *said("update", 2, name=VOLUME, capacity=5)]
    watch = [SNAPSHOT, put(1, active=None, name=VOLUME), put(2, active=None, name=VOLUME)]
    assert not found(record, watch, Truth({VOLUME: Resource("U", 2, capacity=5)}))
    assert found(record, watch, Truth({VOLUME: Resource("U", 2, capacity=4)})) == {checker.LOST}


def test_a_guest_that_was_killed_on_purpose_is_not_lost() -> None:
    watch = [SNAPSHOT, put(1, active=False), put(1), put(1, active=False), put(2, active=False)]
    truth = Truth({NAME: Resource("U", 2, active=False)}, killed_guests=frozenset({"U"}))
    assert not found([*LIFE, *said("stop", 2)], watch, truth)
