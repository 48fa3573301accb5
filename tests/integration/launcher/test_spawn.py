"""What a spawned process is, seen from /proc, and what is left when it is over."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.launcher.running import PYTHON, SLEEP, UID, Launcher, console_guest, sleeper, status
from virtfleet_service.launcher import LauncherClient, LauncherError, Limits, Spawn, SpawnFile, SpawnSocket


async def test_process_has_its_own_user_session_cgroup_and_descriptors(
    launcher: Launcher, compute: LauncherClient
) -> None:
    process = await compute.spawn(sleeper("one"))
    facts = status(process)
    assert facts["Uid"].split() == [str(UID)] * 4
    assert facts["Gid"].split() == [str(UID)] * 4
    assert facts["Groups"] == ""
    assert facts["NoNewPrivs"] == "1"
    assert facts["CapEff"] == facts["CapPrm"] == facts["CapAmb"] == "0" * 16
    assert facts["Umask"] == "0077"
    # Python ignores SIGPIPE and blocks nothing; neither may reach the guest.
    # Signals 32 and 33 are the C library's own: it lets nobody change them, and blocks them for moments.
    assert int(facts["SigIgn"], 16) & ~(0b11 << 31) == 0
    assert int(facts["SigBlk"], 16) & ~(0b11 << 31) == 0
    assert os.getsid(process.pid) == process.pid
    assert f"0::/{launcher.cgroup.name}/one.guest" in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
    descriptors = {path.name: path.readlink() for path in Path(f"/proc/{process.pid}/fd").iterdir()}
    log = launcher.guest_dir("one") / "log"
    assert descriptors == {"0": Path("/dev/null"), "1": log, "2": log}
    assert Path(f"/proc/{process.pid}/cwd").readlink() == Path("/")
    assert Path(f"/proc/{process.pid}/environ").read_bytes() == b""
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert "Max core file size        0                    0 " in limits
    stat = Path(f"/proc/{process.pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    assert process.start_time == int(stat[19])
    assert process.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_sockets_listen_and_descriptors_arrive_by_name(launcher: Launcher, compute: LauncherClient) -> None:
    program = (
        "import os, socket, sys\n"
        "listener = socket.socket(fileno=int(sys.argv[1]))\n"
        "os.write(int(sys.argv[2]), os.environb[b'WORD'])\n"
        "peer, _ = listener.accept()\n"
        "peer.sendall(b'served')\n"
    )
    read_end, write_end = os.pipe()
    spawn = Spawn(
        "fds",
        "t",
        [PYTHON, "-I", "-c", program, "{fd:qmp}", "{fd:pipe}"],
        uid=UID,
        env={"WORD": "fd {fd:pipe}"},
        sockets=[SpawnSocket("qmp", mode=0o660)],
        spec=b"\x00spec",
    )
    process = await compute.spawn(spawn, {"pipe": write_end})
    os.close(write_end)
    assert await asyncio.to_thread(os.read, read_end, 100) == b"fd 4"
    os.close(read_end)
    path = Path(process.sockets["qmp"])
    assert path.stat().st_mode & 0o777 == 0o660
    with await compute.open_socket("fds", "qmp") as line:
        assert await asyncio.get_running_loop().sock_recv(line, 100) == b"served"
    assert (await compute.wait("fds")).code == 0
    assert (launcher.guest_dir("fds") / "spec").read_bytes() == b"\x00spec"
    with pytest.raises(LauncherError) as refused:
        await compute.open_socket("fds", "qmp")
    assert refused.value.reason == "CONNECT_FAILED"


async def test_same_token_answers_the_same_process_and_another_is_refused(compute: LauncherClient) -> None:
    first, second = await asyncio.gather(compute.spawn(sleeper("twice")), compute.spawn(sleeper("twice")))
    assert first.pid == second.pid
    with pytest.raises(LauncherError) as refused:
        await compute.spawn(sleeper("twice", token="other"))
    assert refused.value.reason == "ALREADY_RUNNING"
    await compute.kill("twice")
    assert (await compute.wait("twice")).signal == 9
    again = await compute.spawn(sleeper("twice", token="other"))
    assert again.pid != first.pid
    assert again.exit is None


async def test_last_runs_exit_is_gone_before_the_next_run(launcher: Launcher, compute: LauncherClient) -> None:
    await compute.spawn(Spawn("again", "1", ["/bin/false"], uid=UID))
    assert (await compute.wait("again")).code == 1
    assert (launcher.guest_dir("again") / "exit").exists()
    await compute.spawn(sleeper("again", token="2"))
    assert not (launcher.guest_dir("again") / "exit").exists()
    with pytest.raises(LauncherError) as refused:
        await compute.forget("again")
    assert refused.value.reason == "STILL_RUNNING"


@pytest.mark.parametrize(
    ("spawn", "reason", "stage", "errno"),
    [
        (Spawn("bad", "t", ["/nonexistent"], uid=UID), "EXEC_FAILED", "exec", "ENOENT"),
        (Spawn("bad", "t", [SLEEP, "9"], uid=UID, cwd="/nowhere"), "EXEC_FAILED", "cwd", "ENOENT"),
        (Spawn("bad", "t", [SLEEP, "9"], uid=UID, cwd="/root"), "EXEC_FAILED", "cwd", "EACCES"),
        (Spawn("bad", "t", [SLEEP, "9"], uid=UID, rlimits={"NOFILE": (10, 5)}), "EXEC_FAILED", "rlimits", "EINVAL"),
    ],
)
async def test_failed_exec_says_where_and_leaves_nothing(
    launcher: Launcher, compute: LauncherClient, spawn: Spawn, reason: str, stage: str, errno: str
) -> None:
    with pytest.raises(LauncherError) as refused:
        await compute.spawn(spawn)
    assert (refused.value.reason, refused.value.details.get("stage")) == (reason, stage)
    assert refused.value.details["errno"] == errno
    assert await compute.list_processes() == []
    assert list((launcher.run / "guests").iterdir()) == []
    assert not (launcher.cgroup / "bad.guest").exists()


async def test_what_the_settings_do_not_allow_is_refused(launcher: Launcher, compute: LauncherClient) -> None:
    capabilities = await compute.capabilities()
    assert capabilities.layers["user"].possible
    refusals = {
        "EXECUTABLE_REFUSED": [Spawn("no", "t", ["/bin/ls"], uid=UID), Spawn("no", "t", ["sleep", "1"], uid=UID)],
        "UID_REFUSED": [
            Spawn("no", "t", [SLEEP, "1"], uid=0),
            Spawn("no", "t", [SLEEP, "1"], uid=UID, gid=0),
            Spawn("no", "t", [SLEEP, "1"], uid=capabilities.uids[1] + 1),
            Spawn("no", "t", [SLEEP, "1"], uid=UID, groups=[4]),
        ],
        "CAPABILITY_REFUSED": [Spawn("no", "t", [SLEEP, "1"], uid=UID, ambient_capabilities=["net_admin"])],
        "FILE_REFUSED": [Spawn("no", "t", [SLEEP, "1"], uid=UID, files=[SpawnFile("f", "/etc/shadow", "r")])],
        "TAP_FAILED": [],
    }
    for layer, limits in (
        ("memory_limit", Limits(memory_bytes=1 << 30)),
        ("cpu_limit", Limits(cpu_millis=500)),
        ("pids_limit", Limits(pids=10)),
    ):
        if not capabilities.layers[layer].possible:
            assert capabilities.layers[layer].reason
            refusals.setdefault("LIMIT_UNSUPPORTED", []).append(Spawn("no", "t", [SLEEP, "1"], uid=UID, limits=limits))
    for reason, spawns in refusals.items():
        for spawn in spawns:
            with pytest.raises(LauncherError) as refused:
                await compute.spawn(spawn)
            assert refused.value.reason == reason, spawn
    assert list((launcher.run / "guests").iterdir()) == []


async def test_clients_do_not_see_each_other(launcher: Launcher, compute: LauncherClient) -> None:
    network = launcher.client("network")
    await compute.spawn(sleeper("mine"))
    assert await network.list_processes() == []
    with pytest.raises(LauncherError) as refused:
        await network.kill("mine")
    assert refused.value.reason == "NOT_FOUND"
    with pytest.raises(LauncherError) as refused:
        await network.spawn(sleeper("mine"))
    assert refused.value.reason == "ID_TAKEN"
    assert (launcher.run / "compute.sock").stat().st_mode & 0o777 == 0o600


async def test_stray_children_die_with_the_cgroup(launcher: Launcher, compute: LauncherClient) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    print(os.getpid(), flush=True)\n    time.sleep(1000)\nos.wait()"
    await compute.spawn(Spawn("family", "t", [PYTHON, "-I", "-c", program], uid=UID))
    while not (text := await compute.log("family")):
        await asyncio.sleep(0.02)
    child = os.pidfd_open(int(text))
    await compute.kill("family")
    await compute.wait("family")
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(child, gone.set)
    await asyncio.wait_for(gone.wait(), 5)
    asyncio.get_running_loop().remove_reader(child)
    os.close(child)
    await compute.forget("family")
    for _ in range(200):
        if not (launcher.cgroup / "family.guest").exists():
            break
        await asyncio.sleep(0.02)
    assert not (launcher.cgroup / "family.guest").exists()


async def test_log_is_bounded_without_a_pipe(launcher: Launcher, compute: LauncherClient) -> None:
    program = (
        # What is written while the log is turned over may be lost, the end too: so it is said again.
        "import time\nfor n in range(200000): print('line %08d' % n)\n"
        "while True: print('the end', flush=True); time.sleep(0.2)"
    )
    await compute.spawn(Spawn("noisy", "t", [PYTHON, "-I", "-c", program], uid=UID))
    while not (await compute.log("noisy")).endswith(b"the end\n"):
        await asyncio.sleep(0.05)
    capabilities = await compute.capabilities()
    directory = launcher.guest_dir("noisy")
    assert (directory / "log").stat().st_size <= capabilities.log_bytes
    assert (directory / "log.1").stat().st_size <= capabilities.log_bytes


async def test_hundred_spawns_leave_nothing(launcher: Launcher, compute: LauncherClient) -> None:
    await compute.capabilities()
    descriptors = Path(f"/proc/{launcher.pid}/fd")
    before = len(list(descriptors.iterdir()))

    async def one(index: int) -> None:
        guest = f"guest-{index}"
        spawn = console_guest(guest, "once") if index % 2 else Spawn(guest, "t", ["/bin/true"], uid=UID)
        await compute.spawn(spawn)
        assert (await compute.wait(guest)).code == 0
        assert await compute.forget(guest)
        assert not await compute.forget(guest)

    for start in range(0, 100, 4):
        await asyncio.gather(*(one(start + index) for index in range(4)))
    assert await compute.list_processes() == []
    assert list((launcher.run / "guests").iterdir()) == []
    assert [path for path in launcher.cgroup.iterdir() if path.is_dir()] == []
    assert len(list(descriptors.iterdir())) == before
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    assert children == ""


async def test_long_run_directory_is_no_obstacle(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    running = Launcher(deep)
    running.start()
    try:
        async with running.client() as client:
            await client.spawn(console_guest("g" * 60, "echo"))
            async with await client.console("g" * 60) as console:
                chunk = await anext(aiter(console))
                assert chunk.epoch == console.epoch
    finally:
        await asyncio.to_thread(running.clean)


async def test_second_launcher_on_the_same_directory_ends(launcher: Launcher, compute: LauncherClient) -> None:
    await compute.spawn(sleeper("kept"))
    second = await asyncio.create_subprocess_exec(
        PYTHON, "-I", "-S", str(Path(__file__).parents[3] / "services/launcher/virtfleet_launcher/__main__.py"),
        *launcher.flags, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, text = await second.communicate()
    assert second.returncode == 3
    assert b"another launcher" in text
    assert [process.guest for process in await compute.list_processes()] == ["kept"]


async def test_tap_is_opened_only_if_it_exists(compute: LauncherClient) -> None:
    from virtfleet_service.launcher import SpawnTap

    name = f"vft{os.getpid()}"[:15]
    with pytest.raises(LauncherError) as refused:
        await compute.spawn(Spawn("tap", "t", [SLEEP, "1000"], uid=UID, taps=[SpawnTap("n0", name)]))
    assert (refused.value.reason, refused.value.details["errno"]) == ("TAP_FAILED", "ENODEV")
    assert name not in [interface for _, interface in socket.if_nameindex()]


async def test_a_request_that_is_too_long_is_refused_at_once(launcher: Launcher, compute: LauncherClient) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(LauncherError) as refused:
            await compute.spawn(replace(sleeper("g"), argv=(SLEEP, *("x" * 100_000,) * 30)))
    assert refused.value.reason == "TOO_LARGE"
    assert await compute.list_processes() == []
    assert not list((launcher.run / "guests").iterdir())
    # The line serves as ever.
    await compute.spawn(sleeper("g"))
