"""All legs, in the order in which they run: what wants a fresh fleet comes first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bench import anatomy, calls, cycles, domains, events, fleet_reads, hands, processes, start, transfer
from bench.figures import Figure
from bench.peer import legs as peer
from bench.stage import Stage


@dataclass(frozen=True, slots=True)
class Leg:
    """Is one piece of a run.

    Attributes:
        name: Its name.
        keys: The figures that it gives, the chief ones.
        measure: Gives them.
    """

    name: str
    keys: tuple[str, ...]
    measure: Callable[[Stage], Awaitable[list[Figure]]]


LEGS: tuple[Leg, ...] = (
    Leg("processes", processes.KEYS, processes.leg),
    Leg("calls", calls.KEYS, calls.leg),
    Leg("start", start.KEYS, start.leg),
    Leg("anatomy", anatomy.KEYS, anatomy.leg),
    Leg("cycles", cycles.KEYS, cycles.leg),
    Leg("domains", domains.KEYS, domains.leg),
    Leg("events", events.KEYS, events.leg),
    Leg("transfer", transfer.KEYS, transfer.leg),
    Leg("fleet", fleet_reads.KEYS, fleet_reads.leg),
    Leg("hands", hands.KEYS, hands.leg),
)

PEER = Leg("peer", peer.KEYS, peer.leg)
"""Runs with `PEER=1`, or when it is asked for by name."""


def chosen(names: list[str]) -> list[Leg]:
    """Return the legs that have one of these names or give one of these figures; none: all.

    Raises:
        ValueError: There is no such leg and no such figure.
    """
    legs = [*LEGS, PEER] if peer.wanted() or names else list(LEGS)
    unknown = [name for name in names if not any(name == leg.name or name in leg.keys for leg in legs)]
    if unknown:
        known = ", ".join(f"{leg.name} ({', '.join(leg.keys)})" for leg in legs)
        raise ValueError(f"no leg gives {', '.join(unknown)}; there are {known}")
    return [leg for leg in legs if not names or leg.name in names or set(names) & set(leg.keys)]
