"""Faults and latencies of the test driver, as its settings ask for them."""

from __future__ import annotations

import asyncio
import fnmatch
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from virtfleet_compute.drivers.test.settings import Fault
from virtfleet_service import errors


class Faults:
    """Strikes calls with the faults of the settings."""

    def __init__(self, faults: Sequence[Fault], *, random_seed: int = 0) -> None:
        self._faults = list(faults)
        self._met = [0] * len(self._faults)
        # Repeatable, and of no use to an attacker.
        self._chance = random.Random(random_seed)  # noqa: S311

    def replace(self, faults: Sequence[Fault]) -> None:
        """Put other faults in the place of those that are in force."""
        self._faults = list(faults)
        self._met = [0] * len(self._faults)

    def _match(self, method: str, domain_id: str) -> Fault | None:
        for index, fault in enumerate(self._faults):
            if fault.method not in (method, "*") or not fnmatch.fnmatchcase(domain_id, fault.domains):
                continue
            self._met[index] += 1
            passages = self._met[index]
            if passages <= fault.skip or (fault.count and passages > fault.skip + fault.count):
                continue
            if fault.probability < 1.0 and self._chance.random() >= fault.probability:
                continue
            return fault
        return None

    @asynccontextmanager
    async def around(self, method: str, domain_id: str) -> AsyncIterator[None]:
        """Surround the effect of a method with the fault that strikes this call, if one does."""
        fault = self._match(method, domain_id) if self._faults else None
        if fault is None:
            yield
            return
        if fault.latency_seconds:
            await asyncio.sleep(fault.latency_seconds)
        if fault.hang:
            await asyncio.Event().wait()
        if fault.reason and fault.when == "before":
            raise _error(fault)
        yield
        if fault.reason and fault.when == "after":
            raise _error(fault)


def _error(fault: Fault) -> errors.VirtfleetError:
    return errors.BY_REASON.get(fault.reason, errors.HypervisorFailed)(fault.message, injected=True)
