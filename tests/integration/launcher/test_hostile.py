"""Whatever arrives on its sockets, the launcher answers or hangs up, and goes on."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launcher.running import SLEEP, UID, Launcher, sleeper
from virtfleet_service.launcher import LauncherClient


def dial(launcher: Launcher) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(launcher.run, os.O_PATH)
    line.connect(f"/proc/self/fd/{directory}/compute.sock")
    os.close(directory)
    line.settimeout(10)
    return line


def ask(launcher: Launcher, data: bytes) -> list[dict[str, Any]]:
    """Send bytes, then close that direction and read all the answers."""
    with dial(launcher) as line:
        try:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        while True:
            try:
                piece = line.recv(65536)
            except ConnectionResetError:
                break
            if not piece:
                break
            answer += piece
    return [json.loads(text) for text in answer.splitlines()]


def request(verb: str, **fields: object) -> bytes:
    return json.dumps({"id": 1, "verb": verb, **fields}).encode() + b"\n"


def spawn(**changes: object) -> bytes:
    fields = {"guest": "g", "token": "t", "argv": [SLEEP, "1"], "uid": UID} | changes
    return request("spawn", **fields)


NOT_REQUESTS = {
    "empty": b"\n",
    "text": b"hello\n",
    "list": b"[]\n",
    "number": b"1\n",
    "null": b"null\n",
    "half": b'{"id": 1, "verb": \n',
    "deep": b"[" * 200_000 + b"\n",
    "deep object": b'{"a":' * 100_000 + b"\n",
    "not utf-8": b"\xff\xfe\n",
    "nan": b'{"id": NaN}\n',
    "huge number": b'{"id": ' + b"9" * 5000 + b"}\n",
    "id of text": b'{"id": "1", "verb": "list"}\n',
    "id of bool": b'{"id": true, "verb": "list"}\n',
    "negative id": b'{"id": -1, "verb": "list"}\n',
    "float id": b'{"id": 1.0, "verb": "list"}\n',
    "no id": b'{"verb": "list"}\n',
    "long line": b"x" * 3_000_000 + b"\n",
    "nul": b"\0\n",
}

BAD_REQUESTS = {
    "no verb": b'{"id": 1}\n',
    "verb of number": b'{"id": 1, "verb": 3}\n',
    "unknown verb": request("shutdown"),
    "unknown field": request("list", extra=1),
    "guest missing": request("inspect"),
    "guest of list": request("inspect", guest=["g"]),
    "guest with path": request("inspect", guest="../g"),
    "guest absolute": request("forget", guest="/etc"),
    "guest dots": request("forget", guest=".."),
    "guest empty": request("forget", guest=""),
    "guest newline": request("forget", guest="g\n"),
    "guest long": request("forget", guest="g" * 101),
    "guest unicode": request("forget", guest="g\u0435"),
    "signal unknown": request("kill", guest="g", signal="SEGV"),
    "signal number": request("kill", guest="g", signal=9),
    "log too much": request("log", guest="g", bytes=10**9),
    "argv missing": request("spawn", guest="g", token="t", uid=UID),
    "argv empty": spawn(argv=[]),
    "argv of text": spawn(argv=SLEEP),
    "argv of numbers": spawn(argv=[SLEEP, 1]),
    "argv with nul": spawn(argv=[SLEEP, "a\0b"]),
    "argv with surrogate": spawn(argv=[SLEEP, "\ud800"]),
    "argv too many": spawn(argv=[SLEEP] * 5000),
    "executable traversal": spawn(argv=["/bin/../bin/sleep", "1"]),
    "uid missing": request("spawn", guest="g", token="t", argv=[SLEEP, "1"]),
    "uid text": spawn(uid="20001"),
    "uid bool": spawn(uid=True),
    "uid root": spawn(uid=0),
    "uid negative": spawn(uid=-1),
    "uid huge": spawn(uid=2**70),
    "uid float": spawn(uid=20001.0),
    "token missing": request("spawn", guest="g", argv=[SLEEP, "1"], uid=UID),
    "token newline": spawn(token="a\nb"),
    "env loader": spawn(env={"LD_PRELOAD": "/tmp/x.so"}),
    "env tunables": spawn(env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0"}),
    "env name": spawn(env={"A=B": "c"}),
    "env value": spawn(env={"A": 1}),
    "cwd relative": spawn(cwd="tmp"),
    "socket traversal": spawn(sockets=[{"name": "../x"}]),
    "socket reserved": spawn(sockets=[{"name": "pid"}]),
    "socket ring": spawn(sockets=[{"name": "con.ring"}]),
    "socket twice": spawn(sockets=[{"name": "a"}, {"name": "a"}]),
    "socket mode": spawn(sockets=[{"name": "a", "mode": 0o4777}]),
    "sockets of text": spawn(sockets="a"),
    "sockets too many": spawn(sockets=[{"name": f"a{n}"} for n in range(100)]),
    "tap traversal": spawn(taps=[{"name": "a", "ifname": "../../x"}]),
    "tap long": spawn(taps=[{"name": "a", "ifname": "x" * 16}]),
    "file": spawn(files=[{"name": "a", "path": "/etc/shadow", "flags": "r"}]),
    "fds not sent": spawn(fds=["a"]),
    "fds twice": spawn(fds=["a", "a"]),
    "fd unknown": spawn(argv=[SLEEP, "{fd:nothing}"]),
    "console without socket": spawn(consoles=[{"name": "con"}]),
    "console ring": spawn(sockets=[{"name": "con"}], consoles=[{"name": "con", "ring_bytes": 1}]),
    "limits unknown": spawn(limits={"swap": 1}),
    "limits type": spawn(limits={"memory_bytes": "1G"}),
    "rlimits unknown": spawn(rlimits={"FOO": [1, 1]}),
    "rlimits shape": spawn(rlimits={"NOFILE": 5}),
    "capability": spawn(ambient_capabilities=["sys_admin"]),
    "flag of number": spawn(no_new_privs=0),
    "umask": spawn(umask=0o7777),
    "spec": spawn(spec="!!"),
    "console place": request("console", guest="g", epoch=1),
}


@pytest.fixture
async def victim(launcher: Launcher, compute: LauncherClient) -> AsyncVictim:
    process = await compute.spawn(sleeper("victim"))
    return AsyncVictim(launcher, compute, process.pid)


class AsyncVictim:
    """A running guest that nothing may touch."""

    def __init__(self, launcher: Launcher, client: LauncherClient, pid: int) -> None:
        self.launcher = launcher
        self.client = client
        self.pid = pid
        self.launcher_pid = launcher.pid

    async def check(self) -> None:
        assert [(process.guest, process.pid) for process in await self.client.list_processes()] == [
            ("victim", self.pid)
        ]
        assert (await self.client.capabilities()).pid == self.launcher_pid
        assert [path.name for path in (self.launcher.run / "guests").iterdir()] == ["victim"]


async def test_lines_that_are_no_requests(victim: AsyncVictim) -> None:
    for name, data in NOT_REQUESTS.items():
        answers = await asyncio.to_thread(ask, victim.launcher, data + request("list"))
        assert answers[0]["id"] is None, name
        assert answers[0]["error"]["reason"] == ("TOO_LARGE" if name == "long line" else "INVALID"), name
        # The line after it is served.
        assert [process["guest"] for process in answers[1]["ok"]["processes"]] == ["victim"], name
    await victim.check()


async def test_requests_that_are_wrong(victim: AsyncVictim) -> None:
    reasons = {"unknown verb": "UNKNOWN_VERB", "executable traversal": "EXECUTABLE_REFUSED", "file": "FILE_REFUSED"}
    reasons |= {"uid root": "UID_REFUSED", "capability": "CAPABILITY_REFUSED"}
    for name, data in BAD_REQUESTS.items():
        answers = await asyncio.to_thread(ask, victim.launcher, data)
        assert [answer["id"] for answer in answers] == [1], name
        error = answers[0]["error"]
        expected = reasons.get(
            name,
            "NOT_FOUND" if name in ("log too much", "signal unknown", "signal number", "console place") else "INVALID",
        )
        assert error["reason"] == expected, (name, error)
        assert error["message"], name
    await victim.check()


async def test_unfinished_and_endless_lines(victim: AsyncVictim) -> None:
    half = dial(victim.launcher)
    half.sendall(b'{"id": 1, "verb"')
    assert await asyncio.to_thread(ask, victim.launcher, b"x" * 20_000_000) == [
        {"id": None, "error": {"reason": "TOO_LARGE", "message": "a line is at most 2097152 bytes"}}
    ]
    silent = [dial(victim.launcher) for _ in range(100)]
    await victim.check()
    for line in (half, *silent):
        line.close()
    memory = Path(f"/proc/{victim.launcher_pid}/status").read_text()
    assert int(memory.split("VmRSS:")[1].split()[0]) < 40_000


async def test_descriptors_that_nobody_declared_are_closed(victim: AsyncVictim) -> None:
    descriptors = Path(f"/proc/{victim.launcher_pid}/fd")
    await victim.client.list_processes()
    before = len(list(descriptors.iterdir()))

    def flood(data: bytes, count: int, times: int) -> list[dict[str, Any]]:
        read_end, write_end = os.pipe()
        with dial(victim.launcher) as line:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read_end] * count))]
            answer = b""
            try:
                for _ in range(times):
                    line.sendmsg([data], rights)
                while piece := line.recv(65536):
                    answer += piece
            except OSError:
                # Hung up on in the middle of it: what was to come is not sent.
                pass
        os.close(read_end)
        os.close(write_end)
        return [json.loads(text) for text in answer.splitlines()]

    answers = await asyncio.to_thread(flood, request("list"), 3, 1)
    assert answers[-1]["error"]["message"] == "descriptors that no request declared"
    await asyncio.to_thread(flood, b" ", 30, 50)
    await asyncio.to_thread(flood, b"rubbish\n", 2, 1)
    await asyncio.to_thread(flood, request("list"), 250, 1)
    refused = await asyncio.to_thread(flood, spawn(fds=["a", "b"], uid=0), 2, 1)
    assert refused[0]["error"]["reason"] == "UID_REFUSED"
    await victim.check()
    assert len(list(descriptors.iterdir())) == before


async def test_client_that_never_reads_is_hung_up_on(victim: AsyncVictim) -> None:
    def pour() -> None:
        with dial(victim.launcher) as line:
            try:
                while True:
                    line.sendall(request("hello") * 100)
            except OSError:
                return

    await asyncio.to_thread(pour)
    await victim.check()


async def test_too_many_connections(victim: AsyncVictim) -> None:
    await victim.client.list_processes()
    lines = [dial(victim.launcher) for _ in range(300)]
    # The one that was there before is served as ever.
    await victim.check()
    for line in lines:
        line.close()
    assert [answer["id"] for answer in await asyncio.to_thread(ask, victim.launcher, request("hello"))] == [1]
