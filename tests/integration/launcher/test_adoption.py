"""The launcher dies, the processes do not, and the next one knows all about them."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.launcher.running import PYTHON, SLEEP, UID, Launcher, console_guest, sleeper
from virtfleet_service.launcher import (
    Connected,
    ConsoleData,
    ConsoleGap,
    Exited,
    LauncherClient,
    LauncherError,
    Spawn,
    SpawnSocket,
)


async def take_exit(events: AsyncIterator[Connected | Exited], guest: str) -> Exited:
    async for event in events:
        if isinstance(event, Exited) and event.exit.guest == guest:
            return event
    raise AssertionError(guest)


async def reaped(pidfd: int) -> None:
    """Wait until init has reaped it, which may take a second, and close the descriptor."""
    poll = select.poll()
    poll.register(pidfd, 0)
    assert await asyncio.to_thread(poll.poll, 20_000) == [(pidfd, select.POLLHUP)]
    os.close(pidfd)


def restart(launcher: Launcher) -> None:
    launcher.end(signal.SIGKILL)
    launcher.start()


async def test_processes_survive_and_are_adopted(launcher: Launcher, compute: LauncherClient) -> None:
    before = await compute.spawn(sleeper("kept"))
    instance = (await compute.capabilities()).instance
    restart(launcher)
    after = await compute.inspect("kept")
    assert (await compute.capabilities()).instance != instance
    assert (after.pid, after.start_time, after.token) == (before.pid, before.start_time, before.token)
    assert after.state == "running"
    assert after.adopted
    assert (await compute.spawn(sleeper("kept"))).pid == before.pid
    with pytest.raises(LauncherError) as refused:
        await compute.spawn(sleeper("kept", token="other"))
    assert refused.value.reason == "ALREADY_RUNNING"
    await compute.kill("kept", "TERM")
    ended = await compute.wait("kept")
    assert (ended.outcome, ended.signal, ended.maxrss) == ("signaled", signal.SIGTERM, None)
    # Whoever waits hears of the end before the group is taken apart; what is asked next comes after it.
    assert await compute.forget("kept")
    assert not (launcher.cgroup / "kept.guest").exists()


async def test_exit_code_of_an_adopted_process(launcher: Launcher, compute: LauncherClient) -> None:
    program = "import socket, sys\nlistener = socket.socket(fileno=int(sys.argv[1]))\nlistener.accept()\nsys.exit(7)"
    spawn = Spawn(
        "seven", "t", [PYTHON, "-I", "-c", program, "{fd:door}"], uid=UID, sockets=[SpawnSocket("door")]
    )  # fmt: skip
    await compute.spawn(spawn)
    restart(launcher)
    layer = (await compute.capabilities()).layers["exit_status_of_adopted"]
    (await compute.open_socket("seven", "door")).close()
    ended = await compute.wait("seven")
    assert ended.outcome == ("exited" if layer.possible else "unknown")
    assert ended.code == (7 if layer.possible else None)
    assert json.loads((launcher.guest_dir("seven") / "exit").read_text())["code"] == ended.code


async def test_exit_of_an_adopted_process_that_was_reaped_unseen(launcher: Launcher, compute: LauncherClient) -> None:
    process = await compute.spawn(sleeper("reaped"))
    restart(launcher)
    layer = (await compute.capabilities()).layers["exit_status_of_adopted"]
    os.kill(launcher.pid, signal.SIGSTOP)
    pidfd = os.pidfd_open(process.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    await reaped(pidfd)
    os.kill(launcher.pid, signal.SIGCONT)
    assert (await compute.wait("reaped")).signal == (signal.SIGTERM if layer.possible else None)


async def test_death_while_no_launcher_was_there_is_unknown_never_zero(
    launcher: Launcher, compute: LauncherClient
) -> None:
    process = await compute.spawn(sleeper("unseen"))
    pidfd = os.pidfd_open(process.pid)
    launcher.end(signal.SIGKILL)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    await reaped(pidfd)
    launcher.start()
    ended = await compute.wait("unseen")
    assert (ended.outcome, ended.code, ended.signal) == ("unknown", None, None)
    assert not (launcher.cgroup / "unseen.guest").exists()


async def test_pid_of_another_process_is_not_adopted(launcher: Launcher, compute: LauncherClient) -> None:
    process = await compute.spawn(sleeper("gone"))
    other = await compute.spawn(sleeper("other"))
    await compute.kill("gone")
    await compute.wait("gone")
    launcher.end(signal.SIGKILL)
    directory = launcher.guest_dir("gone")
    (directory / "exit").unlink()
    # The pid now means another process, and its recorded start time does not fit.
    born = json.loads((directory / "pid").read_text())
    (directory / "pid").write_text(json.dumps(born | {"pid": other.pid, "start_time": born["start_time"] - 1}))
    launcher.start()
    assert (await compute.inspect("gone")).state == "ended"
    assert (await compute.inspect("other")).state == "running"
    assert process.pid != other.pid


async def test_process_of_another_boot_is_not_adopted_whatever_its_pid_means_now(
    launcher: Launcher, compute: LauncherClient
) -> None:
    await compute.spawn(sleeper("gone"))
    other = await compute.spawn(sleeper("other"))
    await compute.kill("gone")
    await compute.wait("gone")
    launcher.end(signal.SIGKILL)
    # A run directory that outlived a boot of the host: pid and start time, which count from the boot, are met again.
    directory = launcher.guest_dir("gone")
    (directory / "exit").unlink()
    born = json.loads((launcher.guest_dir("other") / "pid").read_text())
    (directory / "pid").write_text(json.dumps(born | {"boot_id": "00000000-0000-0000-0000-000000000000"}))
    launcher.start()
    found = await compute.inspect("gone")
    assert (found.state, found.boot_id) == ("ended", "00000000-0000-0000-0000-000000000000")
    assert found.exit is not None
    assert found.exit.outcome == "unknown"
    with pytest.raises(LauncherError) as refused:
        await compute.kill("gone")
    assert refused.value.reason == "NOT_RUNNING"
    await compute.forget("gone")
    assert (await compute.inspect("other")).pid == other.pid
    assert (await compute.inspect("other")).state == "running"


async def test_watch_is_resumed_and_tells_each_end_until_it_is_forgotten(
    launcher: Launcher, compute: LauncherClient
) -> None:
    events = compute.events()
    first = await anext(events)
    assert isinstance(first, Connected)
    await compute.spawn(sleeper("a"))
    await compute.spawn(sleeper("b"))
    await compute.kill("a")
    told = await take_exit(events, "a")
    assert told.exit.signal == signal.SIGKILL
    assert told.exit.maxrss is not None
    assert told.exit.maxrss > 0
    restart(launcher)
    second = await anext(events)
    assert isinstance(second, Connected)
    assert second.instance != first.instance
    assert (await take_exit(events, "a")).exit == told.exit
    await compute.forget("a")
    await compute.kill("b")
    assert (await take_exit(events, "b")).exit.outcome in ("signaled", "unknown")
    await events.aclose()  # type: ignore[attr-defined]  # an async generator, typed as the iterator that callers need


async def test_wait_goes_on_over_a_restart(launcher: Launcher, compute: LauncherClient) -> None:
    await compute.spawn(sleeper("long"))
    waiting = asyncio.create_task(compute.wait("long"))
    await compute.list_processes()
    restart(launcher)
    await compute.kill("long")
    assert (await waiting).guest == "long"


async def test_console_history_survives_with_a_told_gap(launcher: Launcher, compute: LauncherClient) -> None:
    await compute.spawn(console_guest("echo", "echo"))
    async with await compute.console("echo", write=True) as console:
        chunks = aiter(console)
        first = await anext(chunks)
        assert isinstance(first, ConsoleData)
        restart(launcher)
        gap = await anext(chunks)
        assert isinstance(gap, ConsoleGap)
        assert gap.skipped is None
        assert gap.epoch > first.epoch
        # The guest greets each client of its socket; the writer's place was taken again.
        text = b""
        await console.write(b"abc")
        while b"ABC" not in text:
            chunk = await anext(chunks)
            assert isinstance(chunk, ConsoleData)
            assert chunk.epoch == gap.epoch
            text += chunk.data
        assert text == b"hello\nABC"
    async with await compute.console("echo", follow=False) as console:
        history = [chunk async for chunk in console]
    assert [chunk.data if isinstance(chunk, ConsoleData) else None for chunk in history] == [
        b"hello\n",
        None,
        b"hello\nABC",
    ]


async def test_damaged_files_do_not_stop_the_next_launcher(launcher: Launcher, compute: LauncherClient) -> None:
    ring = await compute.spawn(console_guest("ring", "echo"))
    record = await compute.spawn(sleeper("record"))
    await compute.spawn(sleeper("pid"))
    launcher.end(signal.SIGKILL)
    victim = os.pidfd_open(json.loads((launcher.guest_dir("pid") / "pid").read_text())["pid"])
    signal.pidfd_send_signal(victim, signal.SIGKILL)
    os.close(victim)
    (launcher.guest_dir("ring") / "con.ring").write_bytes(b"rubbish")
    (launcher.guest_dir("record") / "record").write_text("[" * 100_000)
    (launcher.guest_dir("pid") / "pid").write_text('{"pid": "x", "start_time": []}')
    (launcher.run / "guests" / "not a guest").mkdir()
    (launcher.run / "guests" / "file").write_text("")
    launcher.start()
    states = {process.guest: (process.state, process.pid) for process in await compute.list_processes()}
    assert states["ring"] == ("running", ring.pid)
    assert states["record"] == ("running", record.pid)
    assert states["pid"][0] == "ended"
    async with await compute.console("ring") as console:
        assert isinstance(await anext(aiter(console)), ConsoleData | ConsoleGap)
    with pytest.raises(LauncherError) as refused:
        await compute.spawn(sleeper("record"))
    assert refused.value.reason == "ALREADY_RUNNING"
    told = [message["message"] for message in launcher.messages() if message["level"] == "error"]
    assert "the ring is lost" in told
    launcher.expected_errors = True


async def test_sigterm_leaves_the_processes(launcher: Launcher, compute: LauncherClient) -> None:
    process = await compute.spawn(sleeper("stays"))
    assert launcher.end(signal.SIGTERM) == 0
    assert Path(f"/proc/{process.pid}/stat").exists()
    assert not (launcher.run / "compute.sock").exists()
    launcher.start()
    assert (await compute.inspect("stays")).pid == process.pid


async def test_kill_during_a_start_loses_and_doubles_nothing(launcher: Launcher, compute: LauncherClient) -> None:
    for turn in range(8):
        starting = asyncio.create_task(compute.spawn(sleeper("turn", token=str(turn))))
        await asyncio.sleep(0.0005 * turn)
        restart(launcher)
        process = await starting
        assert process.state == "running"
        alive = (launcher.cgroup / "turn.guest" / "cgroup.procs").read_text().split()
        assert alive == [str(process.pid)]
        await compute.kill("turn")
        await compute.wait("turn")
        await compute.forget("turn")


@pytest.mark.parametrize("again", [False, True])
async def test_a_child_that_its_launcher_left_before_it_said_who_it_is(
    launcher: Launcher, compute: LauncherClient, *, again: bool
) -> None:
    """Between the fork and its record a child is known to its parent alone; held up there, it must not run unknown."""
    orphan = Spawn("orphan", "t", [SLEEP, "1717"], uid=UID)
    await compute.capabilities()
    everybody, cgroup = launcher.cgroup / "cgroup.freeze", launcher.cgroup / "orphan.guest"
    procs = cgroup / "cgroup.procs"
    everybody.write_text("1")
    try:
        lost = asyncio.create_task(compute.spawn(orphan))
        [first] = await asyncio.to_thread(members, procs, 1)
        # From here on the child alone: the next launcher tries its children out.
        (cgroup / "cgroup.freeze").write_text("1")
        everybody.write_text("0")
        assert not (launcher.guest_dir("orphan") / "pid").exists()
        # The child has copies of the connections and of the listener: whoever holds on to those is not told of the death.
        door = launcher.run / "compute.sock"
        before = door.stat().st_ino
        restart(launcher)
        while not door.exists() or door.stat().st_ino == before:
            await asyncio.sleep(0.02)
        fresh = launcher.client()
        await fresh.list_processes()
        if again:
            # Whoever is in the way is killed; while that lasts, the answer says so.
            with pytest.raises(LauncherError) as busy:
                await fresh.spawn(replace(orphan, token="another"))
            assert (busy.value.reason, busy.value.details["errno"]) == ("SPAWN_FAILED", "EBUSY")
    finally:
        everybody.write_text("0")
        if cgroup.exists():
            (cgroup / "cgroup.freeze").write_text("0")
    # The client asks again at the next launcher, with the same token.
    process = await lost
    assert await asyncio.to_thread(members, procs, 1) == {process.pid}
    assert process.pid != first
    assert json.loads((launcher.guest_dir("orphan") / "pid").read_text())["pid"] == process.pid
    assert [one.pid for one in await fresh.list_processes()] == [process.pid]


def members(procs: Path, count: int) -> set[int]:
    """Return the processes of a cgroup once there are so many and they stay."""
    ends_at = time.monotonic() + 10
    found: list[set[int]] = []
    while time.monotonic() < ends_at:
        found.append({int(pid) for pid in procs.read_text().split()} if procs.exists() else set())
        if [len(one) for one in found[-5:]] == [count] * 5:
            return found[-1]
        time.sleep(0.02)
    raise AssertionError(found[-1])


@pytest.mark.parametrize("left", [None, b"", b"\xff\xfe rubbish", b"[]"])
async def test_a_process_whose_pid_file_is_lost_or_damaged_is_found_by_its_log(
    launcher: Launcher, compute: LauncherClient, left: bytes | None
) -> None:
    """Its run directory was taken for that of a start that never came to anything, and removed under the guest."""
    process = await compute.spawn(console_guest("g", "echo"))
    launcher.end(signal.SIGKILL)
    pid_file = launcher.guest_dir("g") / "pid"
    if left is None:
        pid_file.unlink()
    else:
        pid_file.write_bytes(left)
    launcher.expected_errors = True
    launcher.start()
    (found,) = await compute.list_processes()
    assert (found.state, found.pid, found.start_time) == ("running", process.pid, process.start_time)
    assert json.loads(pid_file.read_text())["pid"] == process.pid
    async with await compute.console("g") as console:
        assert isinstance(await anext(aiter(console)), ConsoleData | ConsoleGap)


async def test_records_of_another_release_stop_no_launcher(launcher: Launcher, compute: LauncherClient) -> None:
    process = await compute.spawn(sleeper("running"))
    await compute.spawn(sleeper("exit"))
    await compute.spawn(sleeper("folder"))
    launcher.end(signal.SIGKILL)
    record = launcher.guest_dir("running") / "record"
    changed = json.loads(record.read_text()) | {"consoles": [{"name": "con"}], "sockets": 3, "argv": [{}], "new": {}}
    record.write_text(json.dumps(changed))
    (launcher.guest_dir("exit") / "exit").write_text('{"code": 0}')
    (launcher.guest_dir("folder") / "record").unlink()
    (launcher.guest_dir("folder") / "record").mkdir()
    launcher.expected_errors = True
    launcher.start()
    states = {found.guest: (found.state, found.pid) for found in await compute.list_processes()}
    assert states["running"] == ("running", process.pid)
    # What an exit that says too little means is asked of the kernel.
    assert states["exit"][0] == "running"
    assert states["folder"][0] == "running"


async def test_a_run_directory_that_cannot_be_used_is_told_in_a_line(tmp_path: Path) -> None:
    for name in ("run", "lock", "guests", "compute.sock"):
        launcher = Launcher(tmp_path / name)
        launcher.run.parent.mkdir()
        if name in ("lock", "compute.sock"):
            (launcher.run / name).mkdir(parents=True)
        else:
            place = launcher.run if name == "run" else launcher.run / name
            place.parent.mkdir(exist_ok=True)
            place.write_text("")
        launcher.start()
        assert launcher.process is not None
        assert launcher.process.wait(10) == 1
        told = launcher.messages()[-1]
        assert (told["message"], name in str(told["error"])) == ("cannot start", True)
        launcher.clean()


async def test_closed_standard_descriptors_are_nobody_elses(tmp_path: Path) -> None:
    """The lock got the number of standard error, and the log was written into it."""
    launcher = Launcher(tmp_path)
    launcher.prefix = [PYTHON, "-c", "import os, sys; os.closerange(0, 3); os.execv(sys.argv[1], sys.argv[1:])"]
    launcher.start()
    try:
        await launcher.client().capabilities()
        assert [str(Path(f"/proc/{launcher.pid}/fd/{number}").readlink()) for number in range(3)] == ["/dev/null"] * 3
        assert (launcher.run / "lock").read_bytes() == b""
    finally:
        launcher.clean()
