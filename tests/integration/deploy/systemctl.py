"""Stands in for systemd on a machine of the tests: starts and stops what the units say, and makes what they are promised.

Of a unit it takes Type (`notify`: started is who says so), ExecStart, UMask, KillMode, State- and RuntimeDirectory with their modes, DynamicUser (a made-up user
who gets the state directory, as systemd gives it: only if its owner is another), NoNewPrivileges and a control group.
Sandboxing is systemd's own affair and left out. Standard library only: it runs by itself, as `/usr/bin/systemctl`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
CGROUPS = Path("/sys/fs/cgroup")
MADE_UP_USER = 61184
START_SECONDS = 60.0


def unit(name: str) -> dict[str, str]:
    """Read the settings of a unit.

    Raises:
        FileNotFoundError: There is no such unit.
    """
    text = (UNITS / name).read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, flags=re.MULTILINE))


def directory(path: Path, mode: str, owner: int) -> None:
    """Make a directory of a service; its content changes hands only with itself."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(int(mode, 8))
    if path.stat().st_uid != owner:
        for inner in (path, *path.rglob("*")):
            os.chown(inner, owner, owner, follow_symlinks=False)


def start(name: str) -> None:
    """Start a service unless it runs."""
    if running(name):
        return
    found = unit(name)
    owner = MADE_UP_USER if found.get("DynamicUser") == "yes" else 0
    for kind, parent in (("State", "/var/lib"), ("Runtime", "/run")):
        if f"{kind}Directory" in found:
            directory(Path(parent, found[f"{kind}Directory"]), found.get(f"{kind}DirectoryMode", "0755"), owner)
    command = shlex.split(found["ExecStart"])
    if owner:
        command = ["setpriv", f"--reuid={owner}", f"--regid={owner}", "--clear-groups", "--no-new-privs", *command]
    group = CGROUPS / "system.slice" / name
    if (CGROUPS / "cgroup.procs").exists():
        group.mkdir(parents=True, exist_ok=True)

    def enter() -> None:
        if group.exists():
            (group / "cgroup.procs").write_text("0")
        os.umask(int(found.get("UMask", "0022"), 8))

    with Path(f"/var/log/{name}.log").open("ab") as log, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        # In the abstract name space a socket has no mode: the made-up user reaches it.
        ready.bind("\0virtfleet-systemctl-" + secrets.token_hex(8))
        ready.settimeout(0.1)
        process = subprocess.Popen(
            command,
            cwd="/",
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "NOTIFY_SOCKET": "@" + os.fsdecode(ready.getsockname()[1:]),
            },
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=enter,  # noqa: PLW1509 - no threads here
        )  # fmt: skip
        Path(f"/run/{name}.pid").write_text(str(process.pid))
        wait_until_ready(name, process, ready)


def wait_until_ready(name: str, process: subprocess.Popen[bytes], ready: socket.socket) -> None:
    """Wait until a service says that it serves.

    Raises:
        SystemExit: It has ended, or has not said it in time.
    """
    ends_at = time.monotonic() + START_SECONDS
    while time.monotonic() < ends_at:
        if process.poll() is not None:
            sys.exit(f"Job for {name} failed: {Path(f'/var/log/{name}.log').read_text()[-2000:]}")
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in ready.recv(4096).splitlines():
                return
    sys.exit(f"{name} does not say that it is ready")


def running(name: str) -> int:
    """Return the process of a service; 0: none."""
    try:
        pid = int(Path(f"/run/{name}.pid").read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pid if state != "Z" else 0


def stop(name: str) -> None:
    """Stop the main process of a service, and wait for its end."""
    pid = running(name)
    if pid:
        os.kill(pid, signal.SIGTERM)
        ends_at = time.monotonic() + 30
        while running(name):
            if time.monotonic() > ends_at:
                sys.exit(f"{name} does not end")
            time.sleep(0.05)


def main() -> None:
    """Do what the command line says.

    Raises:
        SystemExit: It is nothing that this knows, or a service does not start or end.
    """
    verb, *rest = sys.argv[1:]
    names = [name if "." in name else f"{name}.service" for name in rest if name != "--now"]
    for name in names:
        unit(name)
    services = [name for name in names if name.endswith(".service")]
    if verb in ("stop", "restart"):
        for name in services:
            stop(name)
    if verb == "enable" and "--now" not in rest:
        return
    if verb in ("enable", "start", "restart"):
        for name in services:
            start(name)
    elif verb not in ("stop", "daemon-reload"):
        sys.exit(f"systemctl {verb}: not known here")


if __name__ == "__main__":
    main()
