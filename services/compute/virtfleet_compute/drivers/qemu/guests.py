"""All guests of the driver: their processes at the launcher, their monitors, what they tell, and how they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import (
    DomainObservation,
    DomainState,
    DomainStateReason,
    DriverEvent,
    EventKind,
)
from virtfleet_compute.drivers.qemu import failures, naming
from virtfleet_compute.drivers.qemu.guest import SHUT_OFF, Follow, Guest, Reaction
from virtfleet_compute.drivers.qemu.monitor import Event, Monitor, MonitorLost
from virtfleet_compute.drivers.qemu.records import Birth, End, Records, read_birth
from virtfleet_compute.drivers.qemu.settings import Settings
from virtfleet_service.errors import HypervisorFailed, VirtfleetError
from virtfleet_service.launcher import Connected, Exit, LauncherClient, LauncherError, LauncherUnavailable, Process

_log = logging.getLogger(__name__)

EVENT_LIMIT = 10_000
"""How many events wait for the service; more become one GAP."""

ADOPT_SECONDS = 2.0
"""How long the monitor of a guest that was found may take."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_QUIT_SECONDS = 3.0
_FIRST_RETRY_SECONDS = 0.2
_LAST_RETRY_SECONDS = 5.0


class Guests:
    """Holds the guests by uid; those that ended stay until they are forgotten."""

    def __init__(self, launcher: LauncherClient, records: Records, settings: Settings) -> None:
        self.launcher = launcher
        self._records = records
        self._settings = settings
        self._guests: dict[str, Guest] = {}
        self._events: asyncio.Queue[DriverEvent] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch processes and monitors. Leaving hangs up everywhere and ends no guest."""
        self._background(self._watch_processes(), "launcher")
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(self._hang_up(guest) for guest in self._guests.values()))
            self.launcher.close()

    # Finding.

    def get(self, uid: str) -> Guest | None:
        """Return the last run of a domain that is known."""
        return self._guests.get(uid)

    def active(self, uid: str) -> Guest | None:
        """Return the guest of a domain; None: it has none."""
        guest = self._guests.get(uid)
        return guest if guest is not None and guest.active else None

    async def find(self, uid: str) -> Guest | None:
        """Return the last run of a domain, and look at the launcher if none is known."""
        if uid in self._guests:
            return self._guests[uid]
        try:
            process = await self.launcher.inspect(naming.guest(uid))
        except LauncherError as error:
            if error.reason == "NOT_FOUND":
                return None
            raise failures.of_launcher(error, f"looking for the guest of {uid}") from error
        return await self._adopt(uid, process)

    async def list(self) -> list[DomainObservation]:
        """Find what runs and what has ended since somebody last looked."""
        try:
            processes = await self.launcher.list_processes()
        except LauncherError as error:
            raise failures.of_launcher(error, "listing guests") from error
        ours = [(uid, process) for process in processes if (uid := naming.uid_of(process.guest)) is not None]
        await asyncio.gather(*(self._adopt(uid, process) for uid, process in ours))
        return [guest.observe() for guest in self._guests.values() if not guest.starting]

    async def _adopt(self, uid: str, process: Process) -> Guest:
        """Take over a process of an earlier instance of the driver."""
        known = self._guests.get(uid)
        if known is not None and (known.starting or known.pid == process.pid):
            return known
        birth = read_birth(Path(process.sockets.get(naming.MONITOR_SOCKET, "/nonexistent")).parent)
        if birth is None:
            birth = Birth(name="", start_time=datetime.now(UTC), spec=domain_spec_pb2.DomainSpec())
        spec = self._records.active(uid, process.token) or birth.spec
        guest = Guest(uid, process.token, birth, spec, process.pid, max(process.uid, 0))
        self._guests[uid] = guest
        if process.state == "ended":
            guest.exit = process.exit or _unseen(process)
            await self._settle(guest, process.boot_id)
            return guest
        try:
            await self.connect(guest, ADOPT_SECONDS)
            await self._catch_up(guest)
        except (MonitorLost, VirtfleetError) as error:
            _log.warning("guest %s of %s does not answer: %s", guest.pid, birth.name, error)
            # A QEMU serves one connection at a time: this one would be in the way of the next.
            await self._hang_up(guest)
            guest.state, guest.reason = (
                DomainState.DOMAIN_STATE_UNKNOWN,
                DomainStateReason.DOMAIN_STATE_REASON_HYPERVISOR_SILENT,
            )
            guest.control_lost = True
            self._background(self._reconnect(guest), f"reconnect {uid}")
        return guest

    # Starting.

    def add(self, guest: Guest) -> None:
        """Hold a new run."""
        self._guests[guest.uid] = guest

    async def connect(self, guest: Guest, seconds: float) -> Monitor:
        """Shake hands with a guest's monitor.

        Raises:
            MonitorLost: There is no greeting in that time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                line = await self.launcher.open_socket(naming.guest(guest.uid), naming.MONITOR_SOCKET)
        except TimeoutError:
            raise MonitorLost(f"no connection in {seconds:g} s") from None
        except LauncherError as error:
            raise MonitorLost(f"no connection: {error}") from error
        monitor = await Monitor.connect(
            line,
            timeout_seconds=max(deadline - loop.time(), 0.001),
            on_event=lambda event: self._heard(guest, event),
            on_lost=lambda lost: self._lost(guest, lost),
        )
        guest.monitor = monitor
        return monitor

    async def _catch_up(self, guest: Guest) -> None:
        """Ask what nobody has listened to: events of the time without a connection are gone."""
        status = await self.ask(guest, "query-status", timeout_seconds=ADOPT_SECONDS)
        blocks = await self.ask(guest, "query-block", timeout_seconds=ADOPT_SECONDS)
        try:
            guest.apply_blocks(blocks)
            reaction = guest.apply_status(status["status"])
        except (AttributeError, KeyError, TypeError) as error:
            raise HypervisorFailed(
                f"QEMU of {guest.birth.name} says of its state what no QEMU says", resource=guest.birth.name
            ) from error
        if guest.end is None:
            # Of a stop that was not carried out.
            self._records.drop_end(guest.uid)
        self._react(guest, reaction)

    # Commands.

    async def ask(
        self,
        guest: Guest,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Any:  # noqa: ANN401  # JSON
        """Give a guest's monitor a command and return what it returns.

        Raises:
            HypervisorFailed: It refused, or does not answer.
        """
        monitor = guest.monitor
        if monitor is None:
            raise HypervisorFailed(f"QEMU of {guest.birth.name} does not answer", resource=guest.birth.name)
        try:
            answer = await monitor.execute(
                command, arguments, timeout_seconds=timeout_seconds or self._settings.command_seconds
            )
        except MonitorLost as error:
            self._set_control(guest, lost=guest.active)
            raise HypervisorFailed(
                f"QEMU of {guest.birth.name} does not answer: {error}", resource=guest.birth.name, command=command
            ) from error
        self._set_control(guest, lost=False)
        return answer

    # Ending.

    async def kill(self, guest: Guest) -> None:
        """End a process by force and wait until it is gone.

        Raises:
            BackendUnreachable: The launcher does not answer.
            HypervisorFailed: It is still there.
        """
        # Begun before the signal is sent: the answer to that is not worth a round trip of its own.
        ending = asyncio.create_task(self._exit_of(guest))
        try:
            async with asyncio.timeout(self._settings.end_seconds):
                await self._signal(guest)
                await self._conclude(guest, await ending)
        except TimeoutError:
            raise HypervisorFailed(
                f"the process {guest.pid} of {guest.birth.name} was killed and is still there", pid=guest.pid
            ) from None
        except LauncherError as error:
            raise failures.of_launcher(error, f"ending the guest of {guest.birth.name}") from error
        finally:
            ending.cancel()

    async def _signal(self, guest: Guest) -> None:
        try:
            await self.launcher.kill(naming.guest(guest.uid))
        except LauncherError as error:
            if error.reason not in ("NOT_RUNNING", "NOT_FOUND"):
                raise

    async def _exit_of(self, guest: Guest) -> Exit:
        try:
            return await self.launcher.wait(naming.guest(guest.uid))
        except LauncherError as error:
            if error.reason != "NOT_FOUND":
                raise
            # Forgotten, by whomever: that it is gone is known.
            return Exit(naming.guest(guest.uid), guest.pid, "unknown", None, None, None, None, 0.0)

    async def end(self, guest: Guest) -> None:
        """End a guest that has stopped by itself: QEMU closes its images in order, or is killed if it does not."""
        assert guest.end is not None  # noqa: S101  # who calls has set it
        self._records.put_end(guest.uid, guest.runtime_id, guest.end)
        try:
            await self.ask(guest, "quit", timeout_seconds=_QUIT_SECONDS)
            async with asyncio.timeout(_QUIT_SECONDS):
                await guest.ended.wait()
        except (HypervisorFailed, TimeoutError):
            # It may have quit without an answer; if it has not, it is killed.
            await self.kill(guest)

    def decide(self, guest: Guest, end: End) -> None:
        """Write down how a guest is about to end."""
        guest.end = end
        self._records.put_end(guest.uid, guest.runtime_id, end)

    async def boot_again(self, guest: Guest) -> None:
        """Reset a guest that has stopped by itself, and let it go on in the same run."""
        try:
            await self.reset(guest)
            guest.why_running = DomainStateReason.DOMAIN_STATE_REASON_REBOOTED
            await self.ask(guest, "cont")
        except BaseException:
            guest.booting_again = False
            raise

    async def reset(self, guest: Guest) -> None:
        """Reset a guest, also one whose reboots are to stop it."""
        guest.was_reset.clear()
        restarts = guest.spec.on_exit.reboot == domain_spec_pb2.EXIT_ACTION_RESTART
        if not restarts:
            await self.ask(guest, "set-action", {"reboot": "reset"})
        try:
            await self.ask(guest, "system_reset")
            async with asyncio.timeout(self._settings.command_seconds):
                await guest.was_reset.wait()
        except TimeoutError:
            raise HypervisorFailed(f"QEMU of {guest.birth.name} did not reset", resource=guest.birth.name) from None
        finally:
            if not restarts and guest.active:
                await self.ask(guest, "set-action", {"reboot": "shutdown"})

    async def forget(self, uid: str) -> None:
        """Remove what is left of an ended guest.

        Raises:
            BackendUnreachable, HypervisorFailed: The launcher does not answer, or refuses.
        """
        try:
            await self.launcher.forget(naming.guest(uid))
        except LauncherError as error:
            raise failures.of_launcher(error, f"forgetting the guest of {uid}") from error
        guest = self._guests.pop(uid, None)
        if guest is not None:
            await self._hang_up(guest)
        self._records.forget(uid)

    async def said(self, guest_name: str) -> str:
        """Return the redacted end of what a QEMU wrote; empty: nothing, or nobody can tell."""
        try:
            return failures.redacted(await self.launcher.log(guest_name))
        except LauncherError as error:
            _log.warning("the log of %s cannot be read: %s", guest_name, error)
            return ""

    async def _conclude(self, guest: Guest, ending: Exit) -> None:
        if guest.exit is not None:
            await guest.ended.wait()
            return
        guest.exit = ending
        await self._hang_up(guest)
        await self._settle(guest)
        if not guest.starting:
            self._tell(guest, EventKind.STATE_CHANGED, observation=guest.observe())

    async def _settle(self, guest: Guest, boot_id: str = "") -> None:
        """Find out why a guest that is gone has ended."""
        end = guest.end or self._records.end(guest.uid, guest.runtime_id)
        guest.control_lost = False
        guest.errors.clear()
        if end is not None:
            guest.state, guest.reason = end.state, end.reason
        elif boot_id and boot_id != _present_boot():
            guest.state, guest.reason = SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_NODE_REBOOTED
        else:
            guest.state, guest.reason = SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_HYPERVISOR_DIED
            said = await self.said(naming.guest(guest.uid))
            parts = [failures.how(guest.exit), guest.killed_by, said and f"it said: {said}"]
            guest.failure = "; ".join(part for part in parts if part)
        guest.ended.set()

    # Hearing and telling.

    async def events(self) -> AsyncIterator[DriverEvent]:
        """Tell what happens, for ever."""
        while True:
            yield await self._events.get()

    def _heard(self, guest: Guest, event: Event) -> None:
        if self._guests.get(guest.uid) is guest and guest.active:
            self._react(guest, guest.apply(event))

    def _react(self, guest: Guest, reaction: Reaction) -> None:
        for told in reaction.told:
            self._tell(
                guest,
                told.kind,
                reason=told.reason,
                message=told.message,
                device_id=told.device_id,
                cause=told.cause,
                paused=told.paused,
            )
        if reaction.changed and not guest.starting:
            self._tell(guest, EventKind.STATE_CHANGED, observation=guest.observe())
        if reaction.follow is Follow.END:
            self._background(self.end(guest), f"end {guest.uid}")
        elif reaction.follow is Follow.BOOT_AGAIN:
            self._background(self.boot_again(guest), f"boot {guest.uid}")

    def announce(self, guest: Guest) -> None:
        """Tell the state of a guest."""
        self._tell(guest, EventKind.STATE_CHANGED, observation=guest.observe())

    def _tell(self, guest: Guest, kind: EventKind, **facts: Any) -> None:  # noqa: ANN401  # fields of DriverEvent
        event = DriverEvent(kind, guest.uid, datetime.now(UTC), **facts)
        if self._events.qsize() >= EVENT_LIMIT:
            while not self._events.empty():
                self._events.get_nowait()
            event = DriverEvent(EventKind.GAP, "", datetime.now(UTC))
        self._events.put_nowait(event)

    def _set_control(self, guest: Guest, *, lost: bool) -> None:
        if guest.control_lost != lost:
            guest.control_lost = lost
            if not guest.starting:
                self._tell(guest, EventKind.CONTROL_CHANGED, observation=guest.observe())

    async def _watch_processes(self) -> None:
        """Hear of every end. A new launcher tells all ends again."""
        async for event in self.launcher.events():
            if isinstance(event, Connected):
                continue
            uid = naming.uid_of(event.exit.guest)
            guest = self._guests.get(uid) if uid is not None else None
            # An exit of a former run may be told while the next one starts.
            if guest is not None and guest.pid == event.exit.pid:
                await self._conclude(guest, event.exit)

    def _lost(self, guest: Guest, monitor: Monitor) -> None:
        if guest.monitor is monitor:
            guest.monitor = None
            if guest.active and not guest.starting:
                self._background(self._reconnect(guest), f"reconnect {guest.uid}")

    async def _reconnect(self, guest: Guest) -> None:
        """Shake hands again with a guest that lives; its end comes first when that is why the monitor hung up."""
        pause = _FIRST_RETRY_SECONDS
        while guest.active:
            try:
                async with asyncio.timeout(pause):
                    await guest.ended.wait()
                return
            except TimeoutError:
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
            try:
                await self.connect(guest, ADOPT_SECONDS)
                await self._catch_up(guest)
                return
            except (MonitorLost, HypervisorFailed) as error:
                _log.warning("guest %s of %s does not answer: %s", guest.pid, guest.birth.name, error)
                await self._hang_up(guest)
                self._set_control(guest, lost=True)

    async def _hang_up(self, guest: Guest) -> None:
        monitor, guest.monitor = guest.monitor, None
        if monitor is not None:
            await monitor.close()

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(self._guarded(work, name), name=f"qemu {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Awaitable[None], name: str) -> None:
        try:
            await work
        except VirtfleetError as error:
            _log.warning("%s: %s", name, error)
        except LauncherUnavailable as error:
            _log.warning("%s: %s", name, error)
        # The end of a task that nobody awaits: without this line its fault would vanish.
        except Exception:  # noqa: BLE001
            _log.exception("%s failed unexpectedly", name)


def _present_boot() -> str:
    return _BOOT_ID.read_text().strip()


def _unseen(process: Process) -> Exit:
    return Exit(process.guest, process.pid, "unknown", None, None, None, None, 0.0)
