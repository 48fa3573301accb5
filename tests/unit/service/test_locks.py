"""Locks of things: one at a time, also when one goes and the next has been woken but has not come to its turn."""

from __future__ import annotations

import asyncio

from tests.held import containers_naming
from virtfleet_service.locks import Locks


async def test_one_at_a_time_also_between_two_turns() -> None:
    locks = Locks()
    inside = most = 0

    async def work(key: str) -> None:
        nonlocal inside, most
        async with locks.of(key):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(work("volume"))
            if number % 3:
                # So that some come while a lock is free and its next holder is on the way.
                await asyncio.sleep(0)
    assert most == 1


async def test_locks_of_different_things_are_different_and_none_is_kept() -> None:
    locks = Locks()
    async with locks.of("unkept-1"), locks.of("unkept-2"):
        assert locks.of("unkept-1").locked()
        assert not locks.of("unkept-3").locked()
    for number in range(2000):
        async with locks.of(f"unkept-{number}"):
            pass
    assert not containers_naming("unkept-")
