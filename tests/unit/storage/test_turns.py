"""Whose turn it is on a volume: a turn ends when another begins, and nothing is kept of those that have ended."""

from __future__ import annotations

from typing import Any, cast

from virtfleet_storage.attachments import Attachments


def test_a_turn_is_over_when_another_has_begun_also_when_that_has_ended() -> None:
    nothing = cast("Any", None)
    attachments = Attachments(nothing, nothing, nothing)
    with attachments.turn("v") as first:
        assert attachments.has_turn("v", first)
        with attachments.turn("v") as second, attachments.turn("w") as other:
            assert not attachments.has_turn("v", first)
            assert attachments.has_turn("v", second)
            assert attachments.has_turn("w", other)
        assert not attachments.has_turn("v", first)
        with attachments.turn("v") as third:
            assert third not in (first, second)
        assert not attachments.has_turn("v", first)
    # An entry for each volume that ever was would be a leak.
    assert attachments.turns == {}
