"""Consoles: one caller's stream of messages on one side, a session of the driver on the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import console_pb2, domain_pb2
from virtfleet_compute import lifecycle, statuses
from virtfleet_compute.context import Context, ref
from virtfleet_compute.drivers.facets import (
    Console,
    ConsoleEnd,
    ConsoleEndReason,
    ConsoleGap,
    ConsoleItem,
    ConsoleOutput,
    ConsoleSession,
)
from virtfleet_compute.lifecycle import Verb
from virtfleet_service import resources
from virtfleet_service.errors import DeviceNotFound, FieldConflict, FieldRequired, NameMalformed, WrongState

if TYPE_CHECKING:
    from virtfleet_service.call import Call

_REASONS: Mapping[ConsoleEndReason, console_pb2.ConsoleCloseReason.ValueType] = {
    ConsoleEndReason.GUEST_ENDED: console_pb2.CONSOLE_CLOSE_REASON_GUEST_ENDED,
    ConsoleEndReason.TAKEN_OVER: console_pb2.CONSOLE_CLOSE_REASON_TAKEN_OVER,
    ConsoleEndReason.END_OF_LOG: console_pb2.CONSOLE_CLOSE_REASON_END_OF_LOG,
}

_CALLER = console_pb2.CONSOLE_CLOSE_REASON_CALLER
_DRAINING = console_pb2.CONSOLE_CLOSE_REASON_DRAINING


class Consoles:
    """Joins callers and consoles."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """End all streams with the offset at which their callers go on elsewhere."""
        self._draining.set()

    async def open(
        self, requests: AsyncIterator[console_pb2.OpenConsoleRequest], call: Call
    ) -> AsyncIterator[console_pb2.OpenConsoleResponse]:
        """Join a port: see `OpenConsole`."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("action") != "open":
            raise FieldRequired("the first message must hold `open`", field="open")
        if not first.name:
            raise FieldRequired("the first message must hold the name", field="name")
        del call
        domain = self._context.find(first.name)
        resources.check_preconditions(domain, first.etag, first.expected_uid)
        wanted = first.open
        device_id = self._device(domain, wanted.device_id, "open.device_id")
        lifecycle.judge(Verb.OPEN_CONSOLE, domain)
        facet = self._context.facet(domain, Console)  # type: ignore[type-abstract]  # a protocol names the facet
        session = await facet.open_console(
            ref(domain),
            device_id,
            writable=wanted.mode != console_pb2.CONSOLE_MODE_READ_ONLY,
            force=wanted.force,
            epoch=wanted.epoch,
            offset=wanted.offset if wanted.HasField("offset") else None,
        )
        typing = asyncio.create_task(_type(requests, session), name=f"console input of {domain.name}")
        try:
            yield console_pb2.OpenConsoleResponse(opened=_opened(session))
            async with aclosing(self._follow(session, typing)) as events:
                async for kind, event in events:
                    yield console_pb2.OpenConsoleResponse(**{kind: event})  # type: ignore[arg-type]  # kind names its type
        finally:
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)
            await session.close()

    async def read(
        self, request: console_pb2.ReadConsoleLogRequest
    ) -> AsyncIterator[console_pb2.ReadConsoleLogResponse]:
        """Read the history of a port: see `ReadConsoleLog`."""
        domain = self._context.find(request.name)
        device_id = self._device(domain, request.device_id, "device_id")
        facet = self._context.facet(domain, Console)  # type: ignore[type-abstract]  # a protocol names the facet
        session = await facet.read_console_log(
            ref(domain), device_id, epoch=request.epoch, offset=request.offset, follow=request.follow
        )
        try:
            yield console_pb2.ReadConsoleLogResponse(opened=_opened(session))
            async with aclosing(self._follow(session, None)) as events:
                async for kind, event in events:
                    yield console_pb2.ReadConsoleLogResponse(**{kind: event})  # type: ignore[arg-type]  # as above
        finally:
            await session.close()

    async def _follow(
        self, session: ConsoleSession, typing: asyncio.Task[bool] | None
    ) -> AsyncGenerator[tuple[str, console_pb2.ConsoleData | console_pb2.ConsoleGap | console_pb2.ConsoleClosed], None]:
        """Yield what the port puts out until it ends, the caller closes, or the server drains."""
        offset = session.position.offset
        draining = asyncio.create_task(self._draining.wait())
        output = session.output()
        item_task: asyncio.Task[ConsoleItem] | None = None
        try:
            while True:
                if item_task is None:
                    item_task = asyncio.create_task(_next(output))
                waited: set[asyncio.Task[ConsoleItem] | asyncio.Task[bool]] = {item_task, draining}
                waited |= {typing} if typing is not None else set()
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if item_task.done():
                    item = item_task.result()
                    item_task = None
                    kind, event, offset = _event(item, offset)
                    yield kind, event
                    if kind == "closed":
                        return
                elif typing is not None and typing.done():
                    closes, typing = typing.result(), None
                    if closes:
                        yield "closed", console_pb2.ConsoleClosed(reason=_CALLER, offset=offset)
                        return
                else:
                    yield "closed", console_pb2.ConsoleClosed(reason=_DRAINING, offset=offset)
                    return
        finally:
            for task in (item_task, draining):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    @staticmethod
    def _device(domain: domain_pb2.Domain, wanted: str, field: str) -> str:
        status = domain.status
        spec = status.active_spec if statuses.is_active(domain) else status.resolved_spec
        ports = [*sorted(spec.serials), *sorted(spec.consoles)]
        if wanted in ports:
            return wanted
        if wanted or not ports:
            raise DeviceNotFound(
                f"{domain.name} has no serial or console port {wanted}".rstrip(),
                field=field,
                resource=domain.name,
                device_id=wanted,
            )
        return ports[0]


async def _type(requests: AsyncIterator[console_pb2.OpenConsoleRequest], session: ConsoleSession) -> bool:
    """Give the caller's input to the guest. Returns whether the caller wants the stream to end."""
    async for request in requests:
        if request.name:
            raise NameMalformed("only the first message holds a name", field="name")
        if request.etag or request.expected_uid:
            raise FieldConflict(
                "only the first message holds what the domain must be",
                field="etag" if request.etag else "expected_uid",
            )
        action = request.WhichOneof("action")
        if action == "data":
            if not session.position.writable:
                raise WrongState("this session is for reading only", mode="READ_ONLY")
            try:
                await session.write(request.data)
            except WrongState:
                # The guest has ended or another caller writes now; the output says which.
                return False
        elif action == "resize":
            await session.resize(request.resize.column_count, request.resize.row_count)
        elif action == "close":
            return True
        elif action == "open":
            raise WrongState("the console is open", device_id=session.position.device_id)
    return False


async def _next(output: AsyncIterator[ConsoleItem]) -> ConsoleItem:
    return await anext(output)


def _opened(session: ConsoleSession) -> console_pb2.ConsoleOpened:
    position = session.position
    return console_pb2.ConsoleOpened(
        device_id=position.device_id, epoch=position.epoch, offset=position.offset, writable=position.writable
    )


def _event(
    item: ConsoleItem, offset: int
) -> tuple[str, console_pb2.ConsoleData | console_pb2.ConsoleGap | console_pb2.ConsoleClosed, int]:
    """Return kind and message of an item, and the offset behind it."""
    match item:
        case ConsoleOutput(start, data):
            return "data", console_pb2.ConsoleData(offset=start, data=data), start + len(data)
        case ConsoleGap(epoch, start, length):
            return "gap", console_pb2.ConsoleGap(epoch=epoch, offset=start, length_bytes=length), start + length
        case ConsoleEnd(reason, end):
            return "closed", console_pb2.ConsoleClosed(reason=_REASONS[reason], offset=end), offset
