"""A real launcher for a test, with a run directory, cgroup parent and guests of its own, and nothing left of them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
from pathlib import Path

from virtfleet_service.launcher import LauncherClient, Process, Spawn, SpawnConsole, SpawnSocket

PROGRAM = Path(__file__).parents[3] / "services" / "launcher" / "virtfleet_launcher" / "__main__.py"
UNIFIED = next(
    Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"
)
PYTHON = "/usr/bin/python3"
SLEEP = "/bin/sleep"
UID = 20123
EXECUTABLES = (
    PYTHON,
    SLEEP,
    "/bin/true",
    "/bin/false",
    "/nonexistent",
    "/usr/bin/qemu-system-x86_64",
    "/usr/sbin/dnsmasq",
)

#: Prints what it reads from its console socket and then does what the first argument says.
CONSOLE_GUEST = """
import os, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
mode = sys.argv[2]
while True:
    peer, _ = listener.accept()
    if mode == "flood":
        number = 0
        for _ in range(int(sys.argv[3])):
            peer.sendall(b"".join(b"%08d\\n" % n for n in range(number, number + 1000)))
            number += 1000
        break
    if mode == "echo":
        try:
            peer.sendall(b"hello\\n")
            while data := peer.recv(4096):
                peer.sendall(data.upper())
        except ConnectionError:
            continue
    if mode == "once":
        peer.sendall(b"last words")
        break
"""


class Launcher:
    """The launcher's process, which may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.run = directory / "run"
        self.cgroup = UNIFIED / f"launcher-test-{os.getpid()}-{secrets.token_hex(4)}"
        self.log = directory / "launcher.log"
        self.flags = ["--run-dir", str(self.run), "--cgroup-parent", str(self.cgroup)]
        for executable in EXECUTABLES:
            self.flags += ["--executable", executable]
        #: What runs the launcher elsewhere: in a namespace, as another user.
        self.prefix: list[str] = []
        self.program = PROGRAM
        self.process: subprocess.Popen[bytes] | None = None
        self.clients: list[LauncherClient] = []
        #: A test that damages files on purpose reads the errors of the log itself.
        self.expected_errors = False

    def start(self) -> None:
        with self.log.open("ab") as log:
            arguments = [*self.prefix, PYTHON, "-I", "-S", str(self.program), *self.flags]
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(10)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self, name: str = "compute", patience: float = 10.0) -> LauncherClient:
        client = LauncherClient.connect(str(self.run / f"{name}.sock"), patience_seconds=patience)
        self.clients.append(client)
        return client

    def guest_dir(self, guest: str) -> Path:
        return self.run / "guests" / guest

    def messages(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def clean(self) -> None:
        for client in self.clients:
            client.close()
        if self.process is not None and self.process.poll() is None:
            # It may be stopped, by a test that did not come to its end.
            self.process.send_signal(signal.SIGCONT)
            self.end(signal.SIGTERM)
        for path in self.run.glob("guests/*/pid"):
            born = json.loads(path.read_text())
            with contextlib.suppress(OSError, TypeError):
                pidfd = os.pidfd_open(born["pid"])
                try:
                    stat = Path(f"/proc/{born['pid']}/stat").read_bytes().rsplit(b")", 1)[1].split()
                    if int(stat[19]) == born["start_time"]:
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)
        if self.cgroup.is_dir():
            for directory in [*self.cgroup.iterdir()]:
                if directory.is_dir():
                    (directory / "cgroup.kill").write_text("1")
            remove_tree(self.cgroup)


def remove_tree(cgroup: Path) -> None:
    """Remove a cgroup whose processes were killed; the kernel lets go of the last a moment later."""
    for _ in range(500):
        try:
            for directory in cgroup.iterdir():
                if directory.is_dir():
                    directory.rmdir()
            cgroup.rmdir()
        except OSError:
            signal.sigtimedwait([], 0.01)
        else:
            return
    message = f"{cgroup} is still populated"
    raise AssertionError(message)


def sleeper(guest: str, token: str = "t") -> Spawn:
    return Spawn(guest, token, [SLEEP, "1000"], uid=UID)


def console_guest(guest: str, mode: str, *arguments: str, ring_bytes: int = 65536) -> Spawn:
    return Spawn(
        guest,
        "t",
        [PYTHON, "-I", "-c", CONSOLE_GUEST, "{fd:con}", mode, *arguments],
        uid=UID,
        sockets=[SpawnSocket("con")],
        consoles=[SpawnConsole("con", ring_bytes)],
    )


def status(process: Process) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
