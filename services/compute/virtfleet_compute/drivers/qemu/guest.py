"""One guest as the driver knows it, and what QEMU's events and answers mean for it. Does no input or output."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from virtfleet.compute.v1 import device_pb2, domain_pb2, domain_spec_pb2
from virtfleet_compute.drivers.api import (
    DiskError,
    DomainObservation,
    DomainState,
    DomainStateReason,
    EventKind,
)
from virtfleet_compute.drivers.qemu import naming
from virtfleet_compute.drivers.qemu.failures import shown
from virtfleet_compute.drivers.qemu.monitor import Monitor
from virtfleet_compute.drivers.qemu.records import Birth, End
from virtfleet_service.launcher_model import Exit

State: TypeAlias = domain_pb2.DomainState.ValueType
Reason: TypeAlias = domain_pb2.DomainStateReason.ValueType

RUNNING: Final = DomainState.DOMAIN_STATE_RUNNING
PAUSED: Final = DomainState.DOMAIN_STATE_PAUSED
SHUT_OFF: Final = DomainState.DOMAIN_STATE_SHUT_OFF
CRASHED: Final = DomainState.DOMAIN_STATE_CRASHED
SLEEPING: Final = DomainState.DOMAIN_STATE_SLEEPING

FIRMWARE_SECONDS = 2.0
"""How long after a reset the firmware may reset once more by itself."""

_R = DomainStateReason
_STOP = domain_spec_pb2.EXIT_ACTION_STOP
_RESTART = domain_spec_pb2.EXIT_ACTION_RESTART
_PRESERVE = domain_spec_pb2.EXIT_ACTION_PRESERVE

_PAUSES: Mapping[str, Reason] = {
    "paused": _R.DOMAIN_STATE_REASON_USER,
    "prelaunch": _R.DOMAIN_STATE_REASON_STARTED_PAUSED,
    "shutdown": _R.DOMAIN_STATE_REASON_GUEST_SHUTDOWN,
    "guest-panicked": _R.DOMAIN_STATE_REASON_GUEST_CRASHED,
    "io-error": _R.DOMAIN_STATE_REASON_IO_ERROR,
    "watchdog": _R.DOMAIN_STATE_REASON_WATCHDOG,
    "save-vm": _R.DOMAIN_STATE_REASON_SAVING,
    "inmigrate": _R.DOMAIN_STATE_REASON_MIGRATING,
    "finish-migrate": _R.DOMAIN_STATE_REASON_MIGRATING,
    "postmigrate": _R.DOMAIN_STATE_REASON_MIGRATING,
}
_ENDS_FROM_OUTSIDE: Mapping[str, str] = {
    "host-qmp-quit": "somebody else told QEMU to quit",
    "host-signal": "somebody else sent QEMU a signal",
    "host-ui": "somebody else told QEMU to quit",
    "host-error": "QEMU met an error",
}


class Follow(enum.Enum):
    """Says what the driver has to do after an event."""

    NOTHING = "nothing"
    END = "end"
    """End the process; `Guest.end` says why."""
    BOOT_AGAIN = "boot_again"
    """Reset the guest and let it go on."""


@dataclass(frozen=True, slots=True)
class Told:
    """Is something to tell the service beside the change of state."""

    kind: EventKind
    reason: str = ""
    message: str = ""
    device_id: str = ""
    cause: str = ""
    paused: bool = False


@dataclass(slots=True)
class Reaction:
    """Is what an event of QEMU comes to."""

    told: list[Told] = field(default_factory=list)
    changed: bool = False
    """Whether the guest has another state now."""
    follow: Follow = Follow.NOTHING


@dataclass(slots=True)
class Guest:
    """Is one run of one domain."""

    uid: str
    runtime_id: str
    birth: Birth
    spec: domain_spec_pb2.DomainSpec
    """What runs."""
    pid: int
    run_as_uid: int
    state: State = PAUSED
    reason: Reason = _R.DOMAIN_STATE_REASON_STARTING
    monitor: Monitor | None = None
    control_lost: bool = False
    starting: bool = False
    """Whether `start` works on it; whoever started it is told, nobody else."""
    stop_wanted: bool = False
    """Whether the guest has been asked to power itself off: then it ends, whatever `on_exit` says."""
    reboot_wanted: bool = False
    """Whether the guest has been asked to boot again, or was reset: then it does, whatever `on_exit` says."""
    booting_again: bool = False
    """Whether the driver boots it again: pauses on the way are not told."""
    leaving: bool = False
    """Whether it has stopped for good: pauses on the way are not told."""
    end: End | None = None
    """How it is about to end; None: it is not, as far as anybody knows."""
    exit: Exit | None = None
    failure: str = ""
    killed_by: str = ""
    """What QEMU said about who ends it, if that was not the driver."""
    errors: dict[str, str] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    was_reset: asyncio.Event = field(default_factory=asyncio.Event)
    threads: dict[int, int] = field(default_factory=dict)
    """The thread of each virtual processor, once somebody asked."""
    balloon_polled: bool = False
    """Whether QEMU was told to ask the guest for its use of memory."""
    why_running: Reason | None = None
    _why_paused: Reason | None = None
    _firmware_until: float = 0.0
    """Until when a reset is one of the firmware's own."""
    _firmware_next: bool = False
    """Whether the firmware has its turn when the guest goes on."""

    @property
    def active(self) -> bool:
        """Whether there is a process."""
        return self.exit is None

    def observe(self) -> DomainObservation:
        """Return what is known of it."""
        active = self.active
        return DomainObservation(
            uid=self.uid,
            state=self.state,
            reason=self.reason,
            runtime_id=self.runtime_id,
            start_time=self.birth.start_time,
            pid=self.pid if active else 0,
            run_as_uid=self.run_as_uid,
            active_spec=self.spec if active else None,
            disk_errors=tuple(DiskError(device_id, error) for device_id, error in sorted(self.errors.items())),
            failure=self.failure,
            control_lost=self.control_lost,
            name=self.birth.name,
        )

    def apply_status(self, status: str) -> Reaction:
        """Take over what `query-status` says, after nobody has listened for a while."""
        reaction = Reaction()
        if status == "running":
            state, reason = RUNNING, self.reason if self.state == RUNNING else _R.DOMAIN_STATE_REASON_BOOTED
        elif status == "suspended":
            state, reason = SLEEPING, _R.DOMAIN_STATE_REASON_UNSPECIFIED
        else:
            state, reason = PAUSED, _PAUSES.get(status, _R.DOMAIN_STATE_REASON_UNSPECIFIED)
        if status == "shutdown":
            # A reset that was to stop it looks the same; QEMU does not keep the difference.
            self._ended_itself(reaction, self.spec.on_exit.power_off, reason)
        elif status == "guest-panicked":
            self._panicked(reaction)
        elif status == "watchdog":
            self._watchdog(reaction)
        # Who paused it is known better here than there, if anything is known.
        keeps_reason = (
            state == self.state == PAUSED and status == "paused" and self.reason != _R.DOMAIN_STATE_REASON_STARTING
        )
        if not keeps_reason and (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            reaction.changed = True
        return reaction

    def apply(self, event: Mapping[str, Any]) -> Reaction:  # noqa: C901  # a table of events
        """Take over an event of QEMU."""
        reaction = Reaction()
        told = event.get("data")
        # A QEMU that its guest has taken over says what it likes.
        data: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
        match event["event"]:
            case "STOP":
                self._paused(reaction)
            case "RESUME":
                self._running(reaction, _R.DOMAIN_STATE_REASON_UNPAUSED)
            case "WAKEUP":
                self._running(reaction, _R.DOMAIN_STATE_REASON_WOKEN)
            case "SUSPEND":
                self._become(reaction, SLEEPING, _R.DOMAIN_STATE_REASON_UNSPECIFIED)
            case "SHUTDOWN":
                self._shutdown(reaction, data)
            case "RESET":
                self._reset(reaction, data)
            case "GUEST_PANICKED":
                reaction.told.append(Told(EventKind.PANICKED, "GUEST_PANICKED", "the guest's kernel panicked"))
                self._panicked(reaction)
            case "WATCHDOG":
                reaction.told.append(Told(EventKind.WATCHDOG, "WATCHDOG_FIRED", "the guest's watchdog fired"))
                if data.get("action") == "pause":
                    self._watchdog(reaction)
            case "BLOCK_IO_ERROR":
                self._io_error(reaction, data)
            case "RTC_CHANGE":
                reaction.told.append(Told(EventKind.CLOCK_CHANGED, "RTC_CHANGED", "the guest set its clock"))
            case _:
                # New releases have new events; none of them changes what is known here.
                pass
        return reaction

    def _become(self, reaction: Reaction, state: State, reason: Reason) -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            reaction.changed = True

    def _paused(self, reaction: Reaction) -> None:
        reason = self._why_paused or _R.DOMAIN_STATE_REASON_USER
        self._why_paused = None
        if not self.leaving and not self.booting_again:
            self._become(reaction, PAUSED, reason)

    def _running(self, reaction: Reaction, reason: Reason) -> None:
        self._why_paused = None
        self.booting_again = False
        if self._firmware_next:
            self._firmware_next = False
            self._firmware_until = time.monotonic() + FIRMWARE_SECONDS
        # QEMU tries again what failed.
        self.errors.clear()
        self._become(reaction, RUNNING, self.why_running or reason)
        self.why_running = None

    def _shutdown(self, reaction: Reaction, data: Mapping[str, Any]) -> None:
        on_exit = self.spec.on_exit
        why = shown(data.get("reason", ""))
        if why == "guest-shutdown":
            self._ended_itself(reaction, on_exit.power_off, _R.DOMAIN_STATE_REASON_GUEST_SHUTDOWN)
        elif why in ("guest-reset", "subsystem-reset"):
            goes_on = self.reboot_wanted or time.monotonic() < self._firmware_until
            action = _RESTART if goes_on else on_exit.reboot
            self._ended_itself(reaction, action, _R.DOMAIN_STATE_REASON_GUEST_REBOOT_STOP)
        elif why == "guest-panic":
            self._panicked(reaction)
        elif self.end is None:
            self.killed_by = _ENDS_FROM_OUTSIDE.get(why, f"QEMU ended: {why}")

    def _ended_itself(self, reaction: Reaction, action: int, reason: Reason) -> None:
        if self.stop_wanted or action not in (_RESTART, _PRESERVE):
            self._leave(reaction, SHUT_OFF, reason)
        elif action == _RESTART:
            self._boot_again(reaction)
        else:
            self._why_paused = reason

    def _leave(self, reaction: Reaction, state: State, reason: Reason) -> None:
        if not self.leaving:
            self.leaving = True
            self.end = End(state, reason)
            reaction.follow = Follow.END

    def _boot_again(self, reaction: Reaction) -> None:
        # QEMU may tell one reset twice.
        if not self.booting_again:
            self.booting_again = True
            reaction.follow = Follow.BOOT_AGAIN

    def _panicked(self, reaction: Reaction) -> None:
        action = self.spec.on_exit.crash
        reason = _R.DOMAIN_STATE_REASON_GUEST_CRASHED
        if action == _PRESERVE:
            self._why_paused = reason
        elif action == _RESTART and not self.stop_wanted:
            self._boot_again(reaction)
        else:
            self._leave(reaction, CRASHED, reason)

    def _watchdog(self, reaction: Reaction) -> None:
        self._why_paused = _R.DOMAIN_STATE_REASON_WATCHDOG
        actions = {watchdog.action for watchdog in self.spec.watchdogs.values()}
        if device_pb2.WATCHDOG_ACTION_POWER_OFF in actions:
            self._leave(reaction, SHUT_OFF, _R.DOMAIN_STATE_REASON_GUEST_SHUTDOWN)

    def _reset(self, reaction: Reaction, data: Mapping[str, Any]) -> None:
        self.was_reset.set()
        self.stop_wanted = False
        self.reboot_wanted = False
        now = time.monotonic()
        if now < self._firmware_until:
            # SeaBIOS finds itself changed in memory after a reset, restores itself and resets once more, in several
            # ways at once.
            return
        if self.state == RUNNING:
            self._firmware_until = now + FIRMWARE_SECONDS
            self._become(reaction, RUNNING, _R.DOMAIN_STATE_REASON_REBOOTED)
        else:
            self._firmware_next = True
        if data.get("guest") or self.booting_again:
            reaction.told.append(Told(EventKind.REBOOTED, "GUEST_REBOOT", "the guest boots again"))
        else:
            reaction.told.append(Told(EventKind.REBOOTED, "RESET", "the guest was reset"))

    def _io_error(self, reaction: Reaction, data: Mapping[str, Any]) -> None:
        node = str(data.get("node-name", ""))
        # An error may come from any node of the chain: `f.data1`, `p.data1`, `f.data1.2`.
        device_id = next(
            (
                key
                for key in self.spec.disks
                if node.split(".")[1:2] == [naming.short(key)] or naming.disk_id(str(data.get("qom-path", ""))) == key
            ),
            "",
        )
        cause = "enospc" if data.get("nospace") else "other"
        paused = data.get("action") == "stop"
        if paused:
            self._why_paused = _R.DOMAIN_STATE_REASON_IO_ERROR
            self.errors[device_id] = cause
        reaction.told.append(
            Told(
                EventKind.IO_ERROR,
                cause.upper(),
                f"{shown(data.get('operation', 'an access'))} failed: {shown(data.get('reason', 'unknown'))}",
                device_id,
                cause,
                paused=paused,
            )
        )

    def apply_blocks(self, blocks: list[Mapping[str, Any]]) -> None:
        """Take over the errors that `query-block` says still stand."""
        self.errors.clear()
        known = set(self.spec.disks)
        for block in blocks:
            status = block.get("io-status", "ok")
            device_id = naming.disk_id(str(block.get("qdev", "")))
            if status != "ok" and device_id in known:
                self.errors[device_id] = "enospc" if status == "nospace" else "other"
