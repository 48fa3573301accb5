"""QEMUs that fail in every way: each gives its error, and nothing of the run is left."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.qemu import running
from tests.integration.qemu.running import QEMU, FileConnection, Node, alive, facts, serial_spec
from virtfleet.compute.v1 import stats_pb2
from virtfleet_compute.drivers.api import DomainState, EventKind, StartPlan, TapConnection
from virtfleet_compute.drivers.facets import Stats
from virtfleet_service.errors import (
    BackendUnreachable,
    DriverBroken,
    HypervisorFailed,
    VirtfleetError,
)

FAKE = f"""#!/usr/bin/python3 -I
import json, os, re, socket, sys, time
if "none" in [word for before, word in zip(sys.argv, sys.argv[1:]) if before == "-machine"]:
    os.execv("{QEMU}", ["{QEMU}", *sys.argv[1:]])
mode = open(os.path.join(os.path.dirname(sys.argv[0]), "mode")).read()
if mode == "real":
    os.execv("{QEMU}", ["{QEMU}", *sys.argv[1:]])
if mode == "exit":
    print("fake: cannot start, password=hunter2 \\x1b[31m", file=sys.stderr)
    sys.exit(3)
if mode == "crash":
    os.kill(os.getpid(), 11)
number = next(re.search(r"id=qmp,fd=(\\d+)", word)[1] for word in sys.argv if "id=qmp,fd=" in word)
listener = socket.socket(fileno=int(number))
lies = {{"query-status": [], "query-block": 7, "query-cpus-fast": [{{"cpu-index": "x"}}], "query-blockstats": [[]]}}
while mode == "lies":
    peer, _ = listener.accept()
    peer.sendall(json.dumps({{"QMP": {{"version": {{}}, "capabilities": []}}}}).encode() + b"\\n")
    peer.recv(1000)
    peer.sendall(b'{{"return": {{}}}}\\n')
    while asked := peer.recv(1000):
        asked = json.loads(asked)
        if asked["execute"] == "cont":
            peer.sendall(b'{{"event": "RESUME", "data": 7}}\\n')
        answer = {{"return": lies.get(asked["execute"], {{}}), "id": asked["id"]}}
        peer.sendall(json.dumps(answer).encode() + b"\\n")
        if asked["execute"] == "stop":
            peer.sendall(b'{{"return": {{}}, "id": []}}\\n')
peer, _ = listener.accept()
if mode == "garbage":
    peer.sendall(b"SSH-2.0-OpenSSH_9.2\\n")
if mode == "greets":
    peer.sendall(json.dumps({{"QMP": {{"version": {{}}, "capabilities": []}}}}).encode() + b"\\n")
    peer.recv(1000)
    sys.exit(5)
if mode == "silent":
    peer.sendall(json.dumps({{"QMP": {{"version": {{}}, "capabilities": []}}}}).encode() + b"\\n")
    peer.recv(1000)
    peer.sendall(b'{{"return": {{}}}}\\n')
time.sleep(1000)
"""


@pytest.fixture
async def faked() -> AsyncIterator[Node]:
    # The script is told to the launcher before it is there: its folder is only known afterwards.
    path = Path(f"/tmp/vf-fake-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    path.mkdir(mode=0o755)
    script = path / "qemu"
    script.write_text(FAKE)
    script.chmod(0o755)
    settings: dict[str, object] = {"binary": str(script), "start_seconds": 1.0, "command_seconds": 1.0}
    try:
        async with running.node(settings, str(script)) as made:
            mode(made, "real")
            await made.enter()
            yield made
    finally:
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()


def mode(node: Node, value: str) -> None:
    (Path(str(node.settings["binary"])).parent / "mode").write_text(value)


async def nothing_is_left(node: Node, plan: StartPlan) -> None:
    assert facts(await node.driver.inspect(plan.domain)) == ("SHUT_OFF", "UNSPECIFIED")
    assert await node.driver.list() == []
    assert not list((node.launcher.run / "guests").iterdir())
    assert not list((node.folder / "driver").iterdir())
    processes = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert not [path for path in processes if plan.domain.uid.encode() in _command(path)]


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("exit", "QEMU ended with exit code 3; it said: fake: cannot start, password=…"),
        ("crash", "QEMU was ended by signal 11"),
        ("hang", "no greeting in"),
        ("garbage", "no greeting"),
        ("greets", "QEMU ended with exit code 5"),
        ("silent", "no answer to cont"),
    ],
)
async def test_broken_start_tells_why_and_leaves_nothing(faked: Node, how: str, text: str) -> None:
    mode(faked, how)
    plan = await faked.plan(serial_spec())
    with pytest.raises(HypervisorFailed) as failed:
        await faked.driver.start(plan)
    assert text in failed.value.message
    assert failed.value.resource == plan.domain.name
    await nothing_is_left(faked, plan)
    assert faked.heard == []
    # And it is no obstacle.
    mode(faked, "real")
    assert facts(await faked.driver.start(plan)) == ("RUNNING", "BOOTED")


async def test_a_qemu_that_lies_harms_nobody_else(faked: Node) -> None:
    groups = frozenset({stats_pb2.STATS_GROUP_CPU, stats_pb2.STATS_GROUP_VCPU, stats_pb2.STATS_GROUP_DISK})
    honest, liar = await faked.plan(serial_spec()), await faked.plan(serial_spec())
    honest_pid = (await faked.driver.start(honest)).pid
    mode(faked, "lies")
    assert facts(await faked.driver.start(liar)) == ("RUNNING", "BOOTED")
    mode(faked, "real")

    async def counted() -> None:
        stats = faked.driver.facet(Stats)  # type: ignore[type-abstract]  # a protocol is what names a facet
        assert stats is not None
        true, false = await stats.domain_stats([honest.domain, liar.domain], groups)
        assert true.cpu.total_time.ToNanoseconds() > 0
        assert not true.HasField("failure")
        assert "gives no counters" in false.failure.message

    await counted()
    # Its monitor breaks in a way that no QEMU's does: it is tried again, and again it lies.
    await faked.driver.suspend(liar.domain)
    await faked.event(EventKind.CONTROL_CHANGED, liar.domain.uid)
    assert (await faked.driver.inspect(liar.domain)).control_lost
    # Another driver finds both.
    await faked.leave()
    await faked.enter()
    found = {one.uid: one for one in await faked.driver.list()}
    assert facts(found[honest.domain.uid]) == ("RUNNING", "BOOTED")
    assert facts(found[liar.domain.uid]) == ("UNKNOWN", "HYPERVISOR_SILENT")
    assert facts(await faked.driver.stop(liar.domain)) == ("SHUT_OFF", "DESTROYED")
    # And hears of the others' ends.
    os.kill(honest_pid, signal.SIGKILL)
    off = DomainState.DOMAIN_STATE_SHUT_OFF
    ended = await faked.event(EventKind.STATE_CHANGED, honest.domain.uid, state=off)
    assert ended.observation is not None
    assert facts(ended.observation) == ("SHUT_OFF", "HYPERVISOR_DIED")
    for plan in (honest, liar):
        await faked.driver.undefine(plan.domain)
    await nothing_is_left(faked, honest)


async def test_cancelled_start_leaves_nothing(faked: Node) -> None:
    mode(faked, "hang")
    plan = await faked.plan(serial_spec())
    for seconds in (0.0, 0.005, 0.03, 0.2):
        start = asyncio.create_task(faked.driver.start(plan))
        await asyncio.sleep(seconds)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        await nothing_is_left(faked, plan)


async def test_images_and_taps_that_are_missing_are_named(node: Node) -> None:
    spec = serial_spec()
    spec.disks["root"].volume = "pools/p/volumes/root"
    missing = node.folder / "gone.qcow2"
    plan = await node.plan(spec, disks={"root": FileConnection(str(missing), "qcow2")})
    with pytest.raises(HypervisorFailed, match=r"gone\.qcow2"):
        await node.driver.start(plan)
    await nothing_is_left(node, plan)
    broken = node.folder / "broken.qcow2"
    broken.write_bytes(b"not an image" * 100)
    broken.chmod(0o666)
    plan = replace(plan, disks={"root": FileConnection(str(broken), "qcow2")})
    with pytest.raises(HypervisorFailed, match="not in qcow2 format"):
        await node.driver.start(plan)
    await nothing_is_left(node, plan)
    card = serial_spec()
    card.interfaces["lan"].network = "networks/n"
    tap = TapConnection("vfnone0", "br0", "52:54:00:00:00:01", 1500, "")
    plan = await node.plan(card, interfaces={"lan": tap})
    with pytest.raises(HypervisorFailed, match="TAP_FAILED"):
        await node.driver.start(plan)
    await nothing_is_left(node, plan)


async def test_image_that_the_guest_may_not_open_is_refused_by_the_kernel(node: Node) -> None:
    spec = serial_spec()
    spec.disks["root"].volume = "pools/p/volumes/root"
    secret = node.folder / "secret.raw"
    secret.write_bytes(bytes(1 << 20))
    secret.chmod(0o600)
    plan = await node.plan(spec, disks={"root": FileConnection(str(secret), "raw")})
    with pytest.raises(HypervisorFailed, match="Permission denied"):
        await node.driver.start(plan)


@pytest.mark.parametrize(("user", "kind", "text"), [(12, DriverBroken, "UID_REFUSED"), (0, VirtfleetError, "uid")])
async def test_user_outside_of_the_range_is_refused(
    node: Node, user: int, kind: type[VirtfleetError], text: str
) -> None:
    plan = replace(await node.plan(serial_spec()), run_as_uid=user)
    with pytest.raises(kind, match=text):
        await node.driver.start(plan)


async def test_without_a_launcher_nothing_starts_and_guests_live(node: Node) -> None:
    node.driver._launcher._patience_seconds = 0.2
    plan = await node.plan(serial_spec())
    started = await node.driver.start(plan)
    node.launcher.end()
    other = await node.plan(serial_spec())
    with pytest.raises(BackendUnreachable):
        await node.driver.start(other)
    with pytest.raises(BackendUnreachable):
        await node.driver.stop(plan.domain)
    assert alive(started.pid)
    assert facts(await node.driver.suspend(plan.domain)) == ("PAUSED", "USER")
    node.launcher.start()
    node.driver._launcher._patience_seconds = 5.0
    assert facts(await node.driver.stop(plan.domain)) == ("SHUT_OFF", "DESTROYED")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"binary": "/nonexistent/qemu"}, "there is no QEMU at"),
        ({"binary": "/bin/true"}, "exit code 0"),
        ({"binary": "/bin/false"}, "exit code 1"),
    ],
)
async def test_driver_that_cannot_run_says_why(settings: dict[str, object], text: str) -> None:
    async with running.node(settings) as made:
        with pytest.raises(DriverBroken, match=text):
            await made.enter()
