"""What QEMU's events and answers mean for a guest."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_compute.drivers.api import DomainState, DomainStateReason, EventKind
from virtfleet_compute.drivers.qemu import failures
from virtfleet_compute.drivers.qemu.guest import RUNNING, Follow, Guest, Reaction
from virtfleet_compute.drivers.qemu.records import Birth
from virtfleet_service.launcher_model import Exit

STOP = domain_spec_pb2.EXIT_ACTION_STOP
RESTART = domain_spec_pb2.EXIT_ACTION_RESTART
PRESERVE = domain_spec_pb2.EXIT_ACTION_PRESERVE


def running(**policy: int) -> Guest:
    spec = domain_spec_pb2.DomainSpec()
    spec.disks["data"].volume = "pools/p/volumes/data"
    for name, action in policy.items():
        setattr(spec.on_exit, name, action)
    birth = Birth("nodes/n1/domains/web", datetime.now(UTC), spec)
    return Guest("u", "r", birth, spec, 1, 2, RUNNING, DomainStateReason.DOMAIN_STATE_REASON_BOOTED)


def hear(guest: Guest, *events: tuple[str, dict[str, Any]]) -> list[Reaction]:
    return [guest.apply({"event": name, "data": data}) for name, data in events]


def seen(guest: Guest) -> tuple[str, str]:
    return (
        DomainState.Name(guest.state).removeprefix("DOMAIN_STATE_"),
        DomainStateReason.Name(guest.reason).removeprefix("DOMAIN_STATE_REASON_"),
    )


def test_pause_has_its_cause() -> None:
    for cause, reason in (
        (("BLOCK_IO_ERROR", {"action": "stop", "node-name": "f.data", "nospace": True}), "IO_ERROR"),
        (("WATCHDOG", {"action": "pause"}), "WATCHDOG"),
        (("RTC_CHANGE", {"offset": 1}), "USER"),
    ):
        guest = running()
        hear(guest, cause, ("STOP", {}))
        assert seen(guest) == ("PAUSED", reason)
        assert hear(guest, ("STOP", {}))[0].changed == (reason != "USER")
        hear(guest, ("RESUME", {}))
        assert seen(guest) == ("RUNNING", "UNPAUSED")


def test_error_of_a_disk_stands_until_the_guest_goes_on() -> None:
    guest = running()
    [first] = hear(guest, ("BLOCK_IO_ERROR", {"action": "stop", "node-name": "p.data.1", "nospace": True}))
    assert [(told.kind, told.device_id, told.cause, told.paused) for told in first.told] == [
        (EventKind.IO_ERROR, "data", "enospc", True)
    ]
    assert [(each.device_id, each.error) for each in guest.observe().disk_errors] == [("data", "enospc")]
    hear(guest, ("STOP", {}), ("RESUME", {}))
    assert guest.observe().disk_errors == ()
    hear(guest, ("BLOCK_IO_ERROR", {"action": "report", "node-name": "f.other"}))
    assert guest.observe().disk_errors == ()


NAMES = ("STOP", "RESUME", "SHUTDOWN", "RESET", "WATCHDOG", "BLOCK_IO_ERROR", "GUEST_PANICKED", "NONE")
LONG = "\ud800\x1b[2J" * (1 << 20)


@pytest.mark.parametrize("name", [*NAMES, 7, None, ["STOP"]])
@pytest.mark.parametrize(
    "data", [None, 7, [], "x", {"reason": LONG, "operation": [LONG], "node-name": {}, "action": []}]
)
def test_events_that_no_qemu_tells_are_bounded(name: object, data: object) -> None:
    guest = running(crash=PRESERVE, power_off=PRESERVE, reboot=PRESERVE)
    reaction = guest.apply({"event": name, "data": data})
    for text in (guest.killed_by, *(told.message for told in reaction.told)):
        assert len(text) < 2000
        assert text.isprintable()


def test_errors_are_those_of_the_guests_disks() -> None:
    guest = running()
    guest.apply_blocks([{"qdev": f"disk.{LONG}", "io-status": "failed"}, {"qdev": "disk.data", "io-status": "nospace"}])
    assert [(each.device_id, each.error) for each in guest.observe().disk_errors] == [("data", "enospc")]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(
    ("reason", "policy", "follow"),
    [
        ("guest-shutdown", {"power_off": STOP}, Follow.END),
        ("guest-shutdown", {"power_off": RESTART}, Follow.BOOT_AGAIN),
        ("guest-shutdown", {"power_off": PRESERVE}, Follow.NOTHING),
        ("guest-reset", {"reboot": STOP}, Follow.END),
        ("guest-reset", {"reboot": PRESERVE}, Follow.NOTHING),
    ],
)
def test_policy_decides_unless_the_guest_was_asked_to_stop(
    reason: str, policy: dict[str, int], follow: Follow, *, asked: bool
) -> None:
    guest = running(**policy)
    guest.stop_wanted = asked
    first, second = hear(guest, ("SHUTDOWN", {"guest": True, "reason": reason}), ("STOP", {}))
    assert first.follow is (Follow.END if asked else follow)
    # Only what stays is told as a pause.
    assert second.changed == (follow is Follow.NOTHING and not asked)


def test_reset_is_told_once_though_the_firmware_resets_again() -> None:
    guest = running()
    told = hear(guest, *[("RESET", {"guest": True, "reason": "guest-reset"})] * 3)
    assert [len(reaction.told) for reaction in told] == [1, 0, 0]
    assert seen(guest) == ("RUNNING", "REBOOTED")
    stopping = running(reboot=STOP)
    hear(stopping, ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}))
    # The firmware's own: it goes on.
    assert hear(stopping, ("SHUTDOWN", {"reason": "guest-reset"}))[0].follow is Follow.BOOT_AGAIN


def test_one_end_is_followed_once() -> None:
    guest = running()
    first, second = hear(guest, *[("SHUTDOWN", {"reason": "guest-shutdown"})] * 2)
    assert (first.follow, second.follow) == (Follow.END, Follow.NOTHING)


@pytest.mark.parametrize(
    ("status", "expected", "follow"),
    [
        ("running", ("RUNNING", "BOOTED"), Follow.NOTHING),
        ("paused", ("PAUSED", "USER"), Follow.NOTHING),
        ("prelaunch", ("PAUSED", "STARTED_PAUSED"), Follow.NOTHING),
        ("suspended", ("SLEEPING", "UNSPECIFIED"), Follow.NOTHING),
        ("io-error", ("PAUSED", "IO_ERROR"), Follow.NOTHING),
        ("shutdown", ("PAUSED", "GUEST_SHUTDOWN"), Follow.END),
        ("guest-panicked", ("PAUSED", "GUEST_CRASHED"), Follow.END),
        ("something-new", ("PAUSED", "UNSPECIFIED"), Follow.NOTHING),
    ],
)
def test_status_of_a_guest_that_was_found(status: str, expected: tuple[str, str], follow: Follow) -> None:
    guest = running()
    reaction = guest.apply_status(status)
    assert seen(guest) == expected
    assert reaction.follow is follow


def test_watchdog_that_powers_off_ends_the_guest() -> None:
    guest = running()
    guest.spec.watchdogs["dog"].action = device_pb2.WATCHDOG_ACTION_POWER_OFF
    [reaction] = hear(guest, ("WATCHDOG", {"action": "pause"}))
    assert [told.kind for told in reaction.told] == [EventKind.WATCHDOG]
    assert reaction.follow is Follow.END


def test_what_qemu_said_is_cleaned_and_cut() -> None:
    said = b'x: \x1b[31mkey="a b", secret: hunter2; token = t\n' + b"y" * 2000
    text = failures.redacted(said)
    assert len(text) == failures.TAIL_CHARACTERS + 1
    assert failures.redacted(said.rstrip(b"y")) == "x: key=…, secret: …; token = …"
    assert failures.how(None) == "QEMU ended, nobody saw how"
    ended = Exit("g", 1, "exited", 3, None, None, None, 0.0)
    assert failures.how(ended) == "QEMU ended with exit code 3"
