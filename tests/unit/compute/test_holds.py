from __future__ import annotations

import asyncio

import pytest

from virtfleet_compute.drivers.api import DomainObservation, DomainState, DomainStateReason
from virtfleet_compute.holds import Holds


def seen(state: int = DomainState.DOMAIN_STATE_RUNNING, run: str = "r") -> DomainObservation:
    return DomainObservation(
        "u", DomainState.ValueType(state), DomainStateReason.DOMAIN_STATE_REASON_BOOTED, runtime_id=run
    )


async def test_one_holder_at_a_time_in_the_order_of_asking() -> None:
    holds = Holds(lambda _: None)
    order: list[int] = []

    async def work(number: int) -> None:
        async with holds.held("u"):
            order.append(number)
            await asyncio.sleep(0)
            assert order[-1] == number

    await asyncio.gather(*(work(number) for number in range(20)))
    assert order == list(range(20))
    assert holds.get("u") is None


async def test_others_are_not_in_the_way() -> None:
    holds = Holds(lambda _: None)
    async with holds.held("a"), asyncio.timeout(1), holds.held("b"):
        assert holds.get("a") is not holds.get("b")


async def test_one_who_gives_up_waiting_wakes_the_next() -> None:
    holds = Holds(lambda _: None)
    first = await holds.acquire("u")
    given_up = asyncio.create_task(holds.acquire("u"))
    patient = asyncio.create_task(holds.acquire("u"))
    await asyncio.sleep(0)
    holds.release(first)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    async with asyncio.timeout(1):
        holds.release(await patient)
    assert holds.get("u") is None


@pytest.mark.parametrize(
    ("recorded", "told", "outdated"),
    [
        (None, None, False),
        (seen(), None, False),
        (seen(), seen(), False),
        (None, seen(), True),
        (seen(), seen(DomainState.DOMAIN_STATE_SHUT_OFF), True),
        (seen(), seen(run="other"), True),
    ],
    ids=["nothing", "quiet", "same", "unrecorded", "state", "run"],
)
async def test_news_that_the_holder_did_not_record_are_looked_at(
    recorded: DomainObservation | None, told: DomainObservation | None, *, outdated: bool
) -> None:
    looked: list[str] = []
    holds = Holds(looked.append)
    async with holds.held("u") as hold:
        hold.seen, hold.news = recorded, told
    assert looked == (["u"] if outdated else [])
    holds.release(hold)
    assert len(looked) <= 1
