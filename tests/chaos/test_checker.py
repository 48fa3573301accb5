"""The checker, against records that are right and records that are wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.chaos import checker
from tests.chaos.checker import Truth, check

NAME = "nodes/n1/domains/a"


def said(what: str, generation: int = 1, uid: str = "U", name: str = NAME, **more: Any) -> list[dict[str, Any]]:
    return [
        {"say": "intent", "what": what, "name": name},
        {"say": "ack", "what": what, "name": name, "uid": uid, "generation": generation, **more},
    ]


def put(generation: int, uid: str = "U", name: str = NAME) -> dict[str, Any]:
    return {"kind": "put", "name": name, "uid": uid, "generation": generation}


SNAPSHOT = {"kind": "snapshot"}
LIFE = [*said("create"), *said("start"), *said("update", 2)]
WATCH = [SNAPSHOT, put(1), put(2)]
THERE = Truth({NAME: ("U", 2, True)}, Counter({"U": 1}))


def kinds(record: list[dict[str, Any]], watch: list[dict[str, Any]], truth: Truth) -> set[str]:
    return {finding.kind for finding in check(record, {"w": watch}, truth)}


def test_what_is_right_has_no_findings() -> None:
    assert not check(LIFE, {"w": WATCH}, THERE)
    gone = [*LIFE, *said("stop", 2), *said("delete", 0, uid="")]
    assert not check(gone, {"w": [*WATCH, {"kind": "delete", "name": NAME, "uid": "U"}]}, Truth({}))


def test_what_was_not_acknowledged_may_be_or_not() -> None:
    cut = [*said("create"), {"say": "intent", "what": "update", "name": NAME}]
    for generation in (1, 2):
        truth = Truth({NAME: ("U", generation, False)})
        assert not check(cut, {"w": [SNAPSHOT, put(generation)]}, truth)
    begun = [{"say": "intent", "what": "create", "name": NAME}]
    assert not check(begun, {"w": [SNAPSHOT]}, Truth({}))


@pytest.mark.parametrize(
    ("record", "watch", "truth", "kind"),
    [
        (LIFE, [SNAPSHOT], Truth({}), checker.LOST),
        (LIFE, [SNAPSHOT, put(1)], Truth({NAME: ("U", 1, True)}, Counter({"U": 1})), checker.LOST),
        (LIFE, WATCH, Truth({NAME: ("U", 2, False)}), checker.LOST),
        ([*LIFE, *said("delete", 0, uid="")], WATCH, THERE, checker.LOST),
        (
            [*LIFE, *said("update", 4)],
            [*WATCH, put(4)],
            Truth({NAME: ("U", 4, True)}, Counter({"U": 1})),
            checker.TWICE,
        ),
        (LIFE, WATCH, Truth({NAME: ("U", 2, True)}, Counter({"U": 2})), checker.GUEST),
        (LIFE, WATCH, Truth({NAME: ("U", 2, True)}), checker.GUEST),
        (LIFE, WATCH, Truth({NAME: ("U", 2, True)}, Counter({"U": 1, "V": 1})), checker.GUEST),
        (LIFE, [SNAPSHOT, put(1)], THERE, checker.GAP),
        (LIFE, [*WATCH, SNAPSHOT], THERE, checker.GAP),
        (LIFE, [*WATCH, {"kind": "source", "state": checker.RESYNCING}], THERE, checker.GAP),
        (LIFE, [*WATCH, put(1), put(2)], THERE, checker.ORDER),
        (LIFE, WATCH, Truth(THERE.domains, THERE.guests, ["op"]), checker.UNSETTLED),
        (LIFE, WATCH, Truth(THERE.domains, THERE.guests, [], ["vp-1"]), checker.LEFT),
        (
            [
                *LIFE,
                {
                    "say": "failed",
                    "what": "stop",
                    "name": NAME,
                    "code": "INTERNAL",
                    "reason": "UNEXPECTED",
                    "message": "",
                },
            ],
            WATCH,
            THERE,
            checker.FAULT,
        ),
    ],
)
def test_what_is_wrong_is_named(
    record: list[dict[str, Any]], watch: list[dict[str, Any]], truth: Truth, kind: str
) -> None:
    assert kind in kinds(record, watch, truth)


def test_a_guest_that_was_killed_on_purpose_is_not_lost() -> None:
    truth = Truth({NAME: ("U", 2, False)}, killed_guests=frozenset({"U"}))
    assert not check(LIFE, {"w": WATCH}, truth)
