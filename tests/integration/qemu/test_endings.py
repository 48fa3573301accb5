"""What guests do by themselves, and what `on_exit` makes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from tests.integration.qemu import sectors
from tests.integration.qemu.running import FileConnection, Node, alive, console_text, facts
from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainObservation, DomainState, EventKind, StartPlan

STOP = domain_spec_pb2.EXIT_ACTION_STOP
RESTART = domain_spec_pb2.EXIT_ACTION_RESTART
PRESERVE = domain_spec_pb2.EXIT_ACTION_PRESERVE
PAUSED = DomainState.DOMAIN_STATE_PAUSED
SHUT_OFF = DomainState.DOMAIN_STATE_SHUT_OFF
CRASHED = DomainState.DOMAIN_STATE_CRASHED


async def prepared(
    node: Node, code: bytes, *, once: bytes = b"", paused: bool = False, policy: Mapping[str, int] | None = None
) -> StartPlan:
    path = node.folder / "boot.raw"
    sectors.write_disk(path, code, once=once)
    spec = sectors.spec()
    spec.panics["panic"].SetInParent()
    for name, action in (policy or {}).items():
        setattr(spec.on_exit, name, action)
    return await node.plan(spec, paused=paused, disks={"root": FileConnection(str(path), "raw")})


async def ended(node: Node, plan: StartPlan, state: int) -> DomainObservation:
    event = await node.event(EventKind.STATE_CHANGED, plan.domain.uid, state=state)
    assert event.observation is not None
    return event.observation


@pytest.mark.parametrize(
    ("code", "policy", "state", "expected"),
    [
        (sectors.POWER_OFF, {}, SHUT_OFF, ("SHUT_OFF", "GUEST_SHUTDOWN")),
        (sectors.POWER_OFF, {"power_off": PRESERVE}, PAUSED, ("PAUSED", "GUEST_SHUTDOWN")),
        (sectors.RESET, {"reboot": STOP}, SHUT_OFF, ("SHUT_OFF", "GUEST_REBOOT_STOP")),
        (sectors.RESET, {"reboot": PRESERVE}, PAUSED, ("PAUSED", "GUEST_REBOOT_STOP")),
        (sectors.PANIC, {}, CRASHED, ("CRASHED", "GUEST_CRASHED")),
        (sectors.PANIC, {"crash": PRESERVE}, PAUSED, ("PAUSED", "GUEST_CRASHED")),
    ],
)
async def test_end_is_met_as_asked(
    node: Node, code: bytes, policy: dict[str, int], state: int, expected: tuple[str, str]
) -> None:
    plan = await prepared(node, code, policy=policy)
    started = await node.driver.start(plan)
    seen = await ended(node, plan, state)
    assert facts(seen) == expected
    assert seen.failure == ""
    assert alive(started.pid) == (state == PAUSED)
    assert facts(await node.driver.inspect(plan.domain)) == expected
    stopped = await node.driver.shut_down(plan.domain, timeout_seconds=5)
    assert not stopped.active
    assert not alive(started.pid)


@pytest.mark.parametrize(
    ("once", "policy"),
    [
        (sectors.POWER_OFF, {"power_off": RESTART}),
        (sectors.POWER_OFF, {"power_off": RESTART, "reboot": STOP}),
        (sectors.RESET, {}),
        (sectors.PANIC, {"crash": RESTART}),
    ],
)
async def test_guest_boots_again_in_the_same_run(node: Node, once: bytes, policy: dict[str, int]) -> None:
    plan = await prepared(node, sectors.say("B\n") + sectors.HALT, once=sectors.say("A\n") + once, policy=policy)
    started = await node.driver.start(plan)
    await node.event(EventKind.REBOOTED, plan.domain.uid)
    assert await console_text(node, plan.domain, b"B") == b"A\nB\n"
    seen = await node.driver.inspect(plan.domain)
    assert facts(seen) == ("RUNNING", "REBOOTED")
    assert (seen.pid, seen.runtime_id) == (started.pid, plan.runtime_id)
    assert [event.kind for event in node.heard].count(EventKind.REBOOTED) == 1
    await node.driver.stop(plan.domain)


@pytest.mark.parametrize("policy", [{}, {"reboot": STOP}])
async def test_reset_boots_again_whatever_the_policy(node: Node, policy: dict[str, int]) -> None:
    plan = await prepared(
        node, sectors.say("B\n") + sectors.HALT, once=sectors.say("A\n") + sectors.HALT, policy=policy
    )
    started = await node.driver.start(plan)
    await console_text(node, plan.domain, b"A")
    assert (await node.driver.reset(plan.domain)).pid == started.pid
    assert await console_text(node, plan.domain, b"B") == b"A\nB\n"
    assert facts(await node.driver.inspect(plan.domain)) == ("RUNNING", "REBOOTED")
    assert [event.kind for event in node.heard].count(EventKind.REBOOTED) == 1
    await node.driver.stop(plan.domain)


async def test_reset_of_a_paused_guest_leaves_it_paused(node: Node) -> None:
    plan = await prepared(node, sectors.HALT, paused=True, policy={"reboot": STOP})
    await node.driver.start(plan)
    assert (await node.driver.reset(plan.domain)).state == PAUSED
    assert facts(await node.driver.resume(plan.domain)) == ("RUNNING", "UNPAUSED")
    await node.driver.stop(plan.domain)


@asynccontextmanager
async def unheard(node: Node) -> AsyncIterator[None]:
    """Let no driver listen for a while."""
    await node.leave()
    yield
    await node.enter()


@pytest.mark.parametrize(
    ("code", "policy", "expected"),
    [
        (sectors.POWER_OFF, {}, ("SHUT_OFF", "GUEST_SHUTDOWN")),
        (sectors.POWER_OFF, {"power_off": PRESERVE}, ("PAUSED", "GUEST_SHUTDOWN")),
        (sectors.PANIC, {}, ("CRASHED", "GUEST_CRASHED")),
    ],
)
async def test_end_that_nobody_heard_is_found(
    node: Node, code: bytes, policy: dict[str, int], expected: tuple[str, str]
) -> None:
    """The guest waits for a byte, which comes when the driver is gone."""
    # mov dx, 0x3fd; in al, dx; test al, 1; jz back
    wait = b"\xba\xfd\x03\xec\xa8\x01\x74\xfb"
    plan = await prepared(node, sectors.say("A\n") + wait + code, policy=policy)
    await node.driver.start(plan)
    await console_text(node, plan.domain, b"A")
    async with unheard(node):
        client = node.launcher.client()
        console = await client.console(f"qemu-{plan.domain.uid}", write=True, newest=True)
        await console.write(b"x")
        await console.close()
        # The halted guest needs no more; QEMU's monitor says when it has come to that.
        await node.status(plan.domain.uid, {"shutdown", "guest-panicked"})
    if expected[0] != "PAUSED":
        await ended(node, plan, SHUT_OFF if expected[0] == "SHUT_OFF" else CRASHED)
    assert facts(await node.driver.inspect(plan.domain)) == expected
    await node.driver.stop(plan.domain)
