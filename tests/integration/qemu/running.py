"""A QEMU driver over a real launcher for a test, with a folder that guests can reach, and nothing left of either."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.launcher.running import UID, Launcher
from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import (
    BackingFile,
    DomainObservation,
    DomainRef,
    DomainState,
    DomainStateReason,
    DriverEnvironment,
    DriverEvent,
    EventKind,
    FileConnection,
    StartPlan,
)
from virtfleet_compute.drivers.facets import Console, ConsoleOutput, ConsoleSession
from virtfleet_compute.drivers.qemu.driver import QemuDriver, create

QEMU = "/usr/bin/qemu-system-x86_64"
MIB = 1024 * 1024
PAUSED = DomainState.DOMAIN_STATE_PAUSED


@dataclass
class Node:
    """A launcher, a folder, and drivers that come and go."""

    folder: Path
    launcher: Launcher
    settings: dict[str, object] = field(default_factory=lambda: {"accelerator": "tcg"})
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    driver: QemuDriver = field(init=False)
    heard: list[DriverEvent] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def enter(self, *, listen: bool = True) -> QemuDriver:
        """Make a driver, as a service that starts does, and listen to what it tells."""
        self.driver = create(
            DriverEnvironment(
                node="n1",
                state_directory=self.folder / "state",
                run_directory=self.folder / "driver",
                launcher_socket=self.launcher.run / "compute.sock",
                settings=self.settings,
            )
        )
        await self.driver.probe()
        await self.stack.enter_async_context(self.driver.running())
        await self.driver.list()
        self.heard.clear()
        if listen:
            listening = asyncio.create_task(self._listen(self.driver))
            self.stack.callback(listening.cancel)
        return self.driver

    async def leave(self) -> None:
        """Drop the driver, as a service that is killed does, but for what the process held."""
        await self.stack.aclose()
        self.stack = contextlib.AsyncExitStack()

    async def _listen(self, driver: QemuDriver) -> None:
        async for event in driver.events():
            self.heard.append(event)
            self.news.set()
            self.news = asyncio.Event()

    async def event(self, kind: EventKind, uid: str, *, state: int | None = None, seconds: float = 10) -> DriverEvent:
        """Wait for an event."""
        async with asyncio.timeout(seconds):
            while True:
                for event in self.heard:
                    same = event.kind is kind and event.uid == uid
                    if same and (state is None or (event.observation and event.observation.state == state)):
                        return event
                await self.news.wait()

    async def status(self, uid: str, wanted: set[str]) -> None:
        """Ask a guest's QEMU by ourselves until it says one of these; no driver may hold its monitor."""
        line_ = await self.launcher.client().open_socket(f"qemu-{uid}", "qmp")
        reader, writer = await asyncio.open_unix_connection(sock=line_)
        writer.write(b'{"execute": "qmp_capabilities"}\n')
        async with asyncio.timeout(10):
            while True:
                writer.write(b'{"execute": "query-status", "id": 1}\n')
                while (answer := json.loads(await reader.readline())).get("id") != 1:
                    pass
                if answer["return"]["status"] in wanted:
                    break
                await asyncio.sleep(0.02)
        writer.close()
        await writer.wait_closed()

    async def plan(
        self,
        spec: domain_spec_pb2.DomainSpec,
        *,
        domain: DomainRef | None = None,
        paused: bool = False,
        **connections: object,
    ) -> StartPlan:
        """Resolve a spec and make a plan of it."""
        domain = domain or new_domain()
        resolved = await self.driver.resolve(domain, spec, None)
        return StartPlan(
            domain=domain,
            runtime_id=str(uuid.uuid4()),
            spec=resolved,
            run_as_uid=UID,
            paused=paused,
            **connections,  # type: ignore[arg-type]  # fields of the plan
        )


def new_domain() -> DomainRef:
    return DomainRef(f"nodes/n1/domains/t-{uuid.uuid4().hex[:8]}", str(uuid.uuid4()))


@contextlib.asynccontextmanager
async def node(
    settings: dict[str, object] | None = None, *executables: str, prefix: list[str] | None = None
) -> AsyncIterator[Node]:
    """Yield a node that is gone afterwards, with all its guests."""
    folder = Path(tempfile.mkdtemp(prefix="vf-qemu-"))
    folder.chmod(0o711)
    launcher = Launcher(folder)
    launcher.prefix = prefix or []
    for executable in executables:
        launcher.flags += ["--executable", executable]
    launcher.start()
    made = Node(folder, launcher)
    made.settings.update(settings or {})
    try:
        yield made
    finally:
        await made.leave()
        await asyncio.to_thread(launcher.clean)
        shutil.rmtree(folder)


def serial_spec(memory_mib: int = 16) -> domain_spec_pb2.DomainSpec:
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.maximum_bytes = memory_mib * MIB
    spec.serials["tty"].SetInParent()
    return spec


async def line(session: ConsoleSession, pattern: str, seconds: float = 20) -> re.Match[str]:
    """Wait for a line of the console that matches as a whole."""
    text = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for item in session.output():
                if isinstance(item, ConsoleOutput):
                    text += item.data.decode(errors="replace")
                    for whole in text.split("\n")[:-1]:
                        if found := re.fullmatch(pattern, whole.strip()):
                            return found
    raise AssertionError(f"no line {pattern!r}; the console said:\n{text}")


def consoles(driver: QemuDriver) -> Console:
    found = driver.facet(Console)  # type: ignore[type-abstract]  # a protocol is what names a facet
    assert found is not None
    return found


async def console_text(made: Node, domain: DomainRef, until: bytes, seconds: float = 10) -> bytes:
    """Return all that a guest has put out once that is part of it."""
    session = await consoles(made.driver).open_console(domain, "tty", writable=False, force=False, epoch="", offset=0)
    text = b""
    async with asyncio.timeout(seconds):
        async for item in session.output():
            if isinstance(item, ConsoleOutput):
                text += item.data
            if text.endswith(until + b"\n"):
                break
    await session.close()
    return text


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except FileNotFoundError:
        return False


def facts(observation: DomainObservation) -> tuple[str, str]:
    return (
        DomainState.Name(observation.state).removeprefix("DOMAIN_STATE_"),
        DomainStateReason.Name(observation.reason).removeprefix("DOMAIN_STATE_REASON_"),
    )


__all__ = [
    "MIB",
    "PAUSED",
    "QEMU",
    "BackingFile",
    "EventKind",
    "FileConnection",
    "Node",
    "alive",
    "console_text",
    "consoles",
    "facts",
    "line",
    "new_domain",
    "node",
    "serial_spec",
]
