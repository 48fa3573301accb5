"""The faults in force, and what they make of links and door."""

from __future__ import annotations

import asyncio
import fnmatch
import secrets
from collections.abc import Callable, Mapping

from virtfleet.fake.v1 import fake_pb2
from virtfleet_fake.door import Door
from virtfleet_fake.transport import CallFailure, Link
from virtfleet_service import errors
from virtfleet_service.errors import FieldOutOfRange, FieldRequired, ResourceNotFound


class _Strikes:
    """Counts the calls of one fault that ends calls."""

    def __init__(self, fault: fake_pb2.Fault) -> None:
        self.fault = fault
        self.met = 0

    def matches(self, method: str) -> bool:
        error = self.fault.error
        if error.method_pattern and not fnmatch.fnmatchcase(method, error.method_pattern):
            return False
        self.met += 1
        return self.met > error.skip_count and (not error.count or self.met <= error.skip_count + error.count)


class Faults:
    """Holds the faults of a fleet.

    Args:
        door: Where clients come in.
        links: The way to each node, by its id.
    """

    def __init__(self, door: Door, links: Mapping[str, Link]) -> None:
        self._door = door
        self._links = links
        self._faults: dict[str, fake_pb2.Fault] = {}
        self._strikes: dict[str, _Strikes] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def present(self) -> list[fake_pb2.Fault]:
        """The faults in force, in the order of their injection."""
        return list(self._faults.values())

    def check(self, fault: fake_pb2.Fault) -> None:
        """Refuse a fault that cannot be.

        Raises:
            ResourceNotFound: There is no such node.
            FieldRequired: It has no kind.
            FieldOutOfRange: A value cannot be used.
        """
        kind = fault.WhichOneof("kind")
        if kind is None:
            raise FieldRequired("a fault is a freeze, a latency, away or an error", field="fault")
        if fault.node and fault.node not in self._links:
            raise ResourceNotFound(f"the fleet has no node {fault.node}", resource=f"nodes/{fault.node}")
        if kind == "error" and not fault.node:
            raise FieldOutOfRange("an error strikes calls to a node: name one", field="fault.node")
        if kind == "error" and fault.error.reason not in errors.BY_REASON:
            raise FieldOutOfRange(f"there is no reason `{fault.error.reason}`", field="fault.error.reason")

    async def inject(self, fault: fake_pb2.Fault) -> fake_pb2.Fault:
        """Put a fault in force; one with the same id gives way."""
        self.check(fault)
        stored = fake_pb2.Fault()
        stored.CopyFrom(fault)
        stored.fault_id = fault.fault_id or f"fault-{secrets.token_hex(4)}"
        await self._forget(stored.fault_id)
        self._faults[stored.fault_id] = stored
        if stored.WhichOneof("kind") == "error":
            self._strikes[stored.fault_id] = _Strikes(stored)
        if stored.HasField("duration"):
            self._timers[stored.fault_id] = asyncio.get_running_loop().call_later(
                stored.duration.ToTimedelta().total_seconds(), self._lapse, stored.fault_id
            )
        await self._apply(stored.node)
        return stored

    async def clear(self, node: str, fault_id: str, *, count_only: bool) -> int:
        """End faults: of a node (empty: of all), with an id (empty: all); returns how many."""
        chosen = [
            fault.fault_id
            for fault in self._faults.values()
            if (not node or fault.node == node) and fault_id in ("", fault.fault_id)
        ]
        for one in () if count_only else chosen:
            await self._forget(one)
        return len(chosen)

    async def close(self) -> None:
        """Stop all timers."""
        for timer in self._timers.values():
            timer.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _lapse(self, fault_id: str) -> None:
        task = asyncio.ensure_future(self._forget(fault_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, fault_id: str) -> None:
        timer = self._timers.pop(fault_id, None)
        if timer is not None:
            timer.cancel()
        self._strikes.pop(fault_id, None)
        fault = self._faults.pop(fault_id, None)
        if fault is not None:
            await self._apply(fault.node)

    async def _apply(self, node: str) -> None:
        here = [fault for fault in self._faults.values() if fault.node == node]
        frozen = any(fault.HasField("freeze") for fault in here)
        away = any(fault.HasField("away") for fault in here)
        delay = sum(fault.latency.delay.ToTimedelta().total_seconds() for fault in here if fault.HasField("latency"))
        if node:
            link = self._links[node]
            link.interceptor = self._interceptor(node) if any(fault.HasField("error") for fault in here) else None
            link.set(up=not away, frozen=frozen, delay_seconds=delay)
            return
        self._door.set(frozen=frozen, delay_seconds=delay)
        if away:
            await self._door.shut()
        else:
            await self._door.reopen()

    def _interceptor(self, node: str) -> Callable[[str], CallFailure | None]:
        def intercept(path: str) -> CallFailure | None:
            method = path.rpartition(".")[2].replace("/", ".")
            for strikes in self._strikes.values():
                if strikes.fault.node == node and strikes.matches(method):
                    return _failure(strikes.fault.error)
            return None

        return intercept


def _failure(wanted: fake_pb2.CallError) -> CallFailure:
    error = errors.BY_REASON[wanted.reason]("injected into the fake fleet", injected=True)
    status = error.to_status()
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    return CallFailure(error.code, status.message, trailing, after_effect=wanted.after_effect)
