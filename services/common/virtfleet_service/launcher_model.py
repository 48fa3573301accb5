"""What the launcher is asked for and what it tells, as values; `virtfleet_service.launcher` is the client."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Capabilities",
    "Connected",
    "ConsoleData",
    "ConsoleGap",
    "Exit",
    "Exited",
    "LauncherError",
    "LauncherUnavailable",
    "Layer",
    "Limits",
    "Process",
    "Spawn",
    "SpawnConsole",
    "SpawnFile",
    "SpawnSocket",
    "SpawnTap",
    "decode_exit",
    "decode_process",
    "encode_spawn",
    "known",
]


class LauncherError(Exception):
    """The launcher refused; `reason` is stable, `details` holds what else a program may need (errno, stage, field)."""

    def __init__(self, reason: str, message: str, details: Mapping[str, object] | None = None) -> None:
        """Carry the launcher's answer."""
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.details = dict(details or {})


class LauncherUnavailable(LauncherError):
    """Nobody answers on the socket. What was asked for may have happened: ask again, with the same token."""

    def __init__(self, message: str) -> None:
        """Say what was tried."""
        super().__init__("UNAVAILABLE", message)


@dataclass(frozen=True)
class Layer:
    """One layer of isolation: possible here, or the reason why not."""

    possible: bool
    reason: str


@dataclass(frozen=True)
class Capabilities:
    """What the launcher is and may do. `instance` is new with each start of the launcher."""

    protocol: int
    version: str
    instance: int
    pid: int
    boot_id: str
    run_dir: str
    guests_dir: str
    single_user: bool
    uids: tuple[int, int]
    gids: tuple[int, int]
    groups: tuple[int, ...]
    executables: tuple[str, ...]
    root_helpers: tuple[str, ...]
    ring_bytes: int
    log_bytes: int
    layers: dict[str, Layer]


@dataclass(frozen=True)
class SpawnSocket:
    """A unix socket that listens in the run directory before the fork; the child gets it as ``{fd:NAME}``."""

    name: str
    mode: int = 0o600
    backlog: int = 16


@dataclass(frozen=True)
class SpawnTap:
    """An existing tap, opened by the launcher; the child gets it as ``{fd:NAME}``."""

    name: str
    ifname: str


@dataclass(frozen=True)
class SpawnFile:
    """A file that the launcher's settings allow to be opened; `flags` is "r" or "rw"."""

    name: str
    path: str
    flags: str = "rw"


@dataclass(frozen=True)
class SpawnConsole:
    """A console: the name of one of the sockets, whose one client the launcher becomes."""

    name: str
    ring_bytes: int | None = None


@dataclass(frozen=True)
class Limits:
    """What the process's cgroup enforces; a limit that nothing would enforce is refused (LIMIT_UNSUPPORTED)."""

    memory_bytes: int | None = None
    cpu_millis: int | None = None
    pids: int | None = None


@dataclass(frozen=True)
class Spawn:
    """A process to start.

    `token` makes it idempotent: while it runs, the same guest with the same token answers the same process.
    ``{fd:NAME}`` in `argv` and `env` becomes the number of the descriptor with that name. In single-user mode (see
    `Capabilities`) leave `uid` and `gid` unset.
    """

    guest: str
    token: str
    argv: Sequence[str]
    uid: int | None = None
    gid: int | None = None
    groups: Sequence[int] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    umask: int = 0o077
    sockets: Sequence[SpawnSocket] = ()
    taps: Sequence[SpawnTap] = ()
    files: Sequence[SpawnFile] = ()
    consoles: Sequence[SpawnConsole] = ()
    limits: Limits = field(default_factory=Limits)
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    ambient_capabilities: Sequence[str] = ()
    no_new_privs: bool = True
    spec: bytes = b""


@dataclass(frozen=True)
class Exit:
    """How a process ended: `outcome` is "exited" (with code), "signaled" (with signal) or "unknown"."""

    guest: str
    pid: int
    outcome: str
    code: int | None
    signal: int | None
    utime: float | None
    maxrss: int | None
    time: float


@dataclass(frozen=True)
class Process:
    """A process of the launcher; `state` is "starting", "running" or "ended". `argv` is empty in lists."""

    guest: str
    state: str
    pid: int
    start_time: int
    boot_id: str
    token: str
    uid: int
    gid: int
    adopted: bool
    cgroup: str
    cgroup_reason: str
    sockets: dict[str, str]
    consoles: tuple[str, ...]
    exit: Exit | None
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class Connected:
    """The subscription stands (again): with another `instance` it is another launcher. Ended processes follow."""

    instance: int


@dataclass(frozen=True)
class Exited:
    """A process has ended. Told at least once, again after each reconnection, until it is forgotten."""

    exit: Exit


@dataclass(frozen=True)
class ConsoleData:
    """Bytes of a console, the first of which is at (epoch, offset)."""

    epoch: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class ConsoleGap:
    """Bytes are missing before (epoch, offset): so many, or None where nobody counted them (another launcher)."""

    epoch: int
    offset: int
    skipped: int | None


def known(kind: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this side knows: a newer launcher may send more."""
    return {name: value[name] for name in kind.__dataclass_fields__ if name in value}


def decode_exit(value: Mapping[str, Any]) -> Exit:
    """Return an exit as the launcher told it."""
    return Exit(**known(Exit, value))


def decode_process(value: Mapping[str, Any]) -> Process:
    """Return a process as the launcher told it."""
    fields = known(Process, value)
    fields["consoles"] = tuple(fields["consoles"])
    fields["argv"] = tuple(fields.get("argv", ()))
    if fields["exit"] is not None:
        fields["exit"] = decode_exit(fields["exit"])
    return Process(**fields)


def _plain(items: Sequence[Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(item).items() if value is not None} for item in items]


def encode_spawn(spawn: Spawn, names: Sequence[str]) -> dict[str, Any]:
    """Return the request for a spawn; `names` are those of the descriptors that go with it."""
    message: dict[str, Any] = {
        "guest": spawn.guest,
        "token": spawn.token,
        "argv": list(spawn.argv),
        "uid": spawn.uid,
        "gid": spawn.gid,
        "groups": list(spawn.groups),
        "env": dict(spawn.env),
        "cwd": spawn.cwd,
        "umask": spawn.umask,
        "sockets": _plain(spawn.sockets),
        "taps": _plain(spawn.taps),
        "files": _plain(spawn.files),
        "consoles": _plain(spawn.consoles),
        "fds": list(names),
        "limits": _plain([spawn.limits])[0],
        "rlimits": {name: list(pair) for name, pair in spawn.rlimits.items()},
        "ambient_capabilities": list(spawn.ambient_capabilities),
        "no_new_privs": spawn.no_new_privs,
        "spec": base64.b64encode(spawn.spec).decode(),
    }
    return message
