"""The spawn request: its shape, and whether the settings allow it."""

from __future__ import annotations

import os
import re
import resource
from typing import NamedTuple

from virtfleet_launcher import protocol
from virtfleet_launcher.kernel import CAPABILITIES
from virtfleet_launcher.protocol import Fields, Refusal
from virtfleet_launcher.settings import Settings

__all__ = ["Console", "File", "Limits", "Socket", "SpawnRequest", "Tap", "parse_spawn"]

# No NUL, and no half of a surrogate pair: neither can be handed to exec.
_ARGUMENT = "[^\0\ud800-\udfff]{0,131072}"
_PATH = "/[^\0\ud800-\udfff]{0,4000}"
_VARIABLE = "[A-Za-z_][A-Za-z0-9_]{0,99}"
_FD = re.compile(r"\{fd:(" + protocol.NAME + r")\}")
_RLIMITS = ("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC", "STACK")
_RESERVED = re.compile(r"(pid|exit|record|spec|log)(\..*)?|.*\.(ring|new)")
#: The one tunable of the C library that a client may choose; others change what its checks of the heap catch.
_TUNABLES = "glibc.malloc.hugetlb=1"
_MAX_SPEC = 1024 * 1024
_LARGEST = 2**62


class Socket(NamedTuple):
    """A listening unix socket in the run directory."""

    name: str
    mode: int
    backlog: int


class Tap(NamedTuple):
    """A queue of an existing tap."""

    name: str
    ifname: str


class File(NamedTuple):
    """A file that the settings allow to open."""

    name: str
    path: str
    flags: int


class Console(NamedTuple):
    """The ring behind one of the sockets."""

    name: str
    ring_bytes: int


class Limits(NamedTuple):
    """What the cgroup enforces; None: nothing."""

    memory_bytes: int | None
    cpu_millis: int | None
    pids: int | None


class SpawnRequest(NamedTuple):
    """A checked and permitted spawn."""

    guest: str
    token: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    change_user: bool
    umask: int
    sockets: tuple[Socket, ...]
    taps: tuple[Tap, ...]
    files: tuple[File, ...]
    fds: tuple[str, ...]
    consoles: tuple[Console, ...]
    limits: Limits
    rlimits: dict[int, tuple[int, int]]
    ambient_capabilities: tuple[int, ...]
    no_new_privs: bool
    spec: bytes

    def substitute(self, text: str, numbers: dict[str, int]) -> str:
        """Put descriptors' numbers in the place of their names."""
        return _FD.sub(lambda match: str(numbers[match[1]]), text)


def parse_spawn(fields: Fields, settings: Settings, groups: tuple[int, ...]) -> SpawnRequest:
    """Check a spawn request against the protocol and the settings.

    Raises:
        Refusal: INVALID, EXECUTABLE_REFUSED, UID_REFUSED, CAPABILITY_REFUSED or FILE_REFUSED.
    """
    argv = tuple(fields.texts("argv", _ARGUMENT, 4096))
    if not argv:
        raise fields.bad("argv", "must not be empty")
    if argv[0] not in settings.executables:
        raise Refusal("EXECUTABLE_REFUSED", f"{argv[0][:200]!r} is not among the executables of the settings")
    uid, gid = _user(fields, settings, argv[0])
    request = SpawnRequest(
        guest=fields.text("guest", protocol.GUEST),
        token=fields.text("token", protocol.TOKEN),
        argv=argv,
        env=_environment(fields),
        cwd=fields.text("cwd", _PATH, "/"),
        uid=uid,
        gid=gid,
        groups=tuple(fields.integers("groups", 1, 2**32 - 2, 16)),
        change_user=not settings.single_user,
        umask=fields.integer("umask", 0, 0o777, 0o077),
        sockets=tuple(_socket(item) for item in fields.objects("sockets", 32)),
        taps=tuple(_tap(item) for item in fields.objects("taps", 64)),
        files=tuple(_file(item, settings) for item in fields.objects("files", 16)),
        fds=tuple(fields.texts("fds", protocol.NAME, protocol.MAX_FDS)),
        consoles=tuple(_console(item, settings) for item in fields.objects("consoles", 32)),
        limits=_limits(fields),
        rlimits=_rlimits(fields),
        ambient_capabilities=_ambient(fields, settings, argv[0], uid),
        no_new_privs=fields.flag("no_new_privs", default=True),
        spec=fields.data("spec", _MAX_SPEC),
    )
    fields.done()
    for group in request.groups:
        if group not in groups:
            raise Refusal("UID_REFUSED", f"group {group} is not among those of the settings")
    _names(fields, request)
    return request


def _user(fields: Fields, settings: Settings, executable: str) -> tuple[int, int]:
    uid = fields.optional_integer("uid", 0, 2**32 - 2)
    gid = fields.optional_integer("gid", 0, 2**32 - 2)
    if settings.single_user:
        if uid not in (None, os.getuid()) or gid not in (None, os.getgid()):
            raise Refusal("UID_REFUSED", "in single-user mode everything runs as the launcher's own user")
        return os.getuid(), os.getgid()
    if uid is None:
        raise fields.bad("uid", "is missing")
    gid = uid if gid is None else gid
    root_helper = executable in settings.allow_root_helpers
    for kind, number, (low, high) in (("uid", uid, settings.uids), ("gid", gid, settings.gids)):
        if not (low <= number <= high or (number == 0 and root_helper)):
            raise Refusal("UID_REFUSED", f"{kind} {number} is not in {low}-{high}", field=kind)
    return uid, gid


def _environment(fields: Fields) -> dict[str, str]:
    table = fields.table("env", _VARIABLE, 256)
    for name, value in table.items():
        if not isinstance(value, str) or not re.fullmatch(_ARGUMENT, value, re.DOTALL):
            raise fields.bad("env", f"has a value for {name} that is no string")
        # These make the loader run other code than that of the permitted executable.
        if name.startswith("LD_") or name == "GCONV_PATH" or (name == "GLIBC_TUNABLES" and value != _TUNABLES):
            raise fields.bad("env", f"must not set {name}")
    return table


def _socket(item: Fields) -> Socket:
    result = Socket(
        item.text("name", protocol.NAME), item.integer("mode", 0, 0o777, 0o600), item.integer("backlog", 1, 4096, 16)
    )
    if _RESERVED.fullmatch(result.name):
        raise item.bad("name", "is the launcher's own file")
    item.done()
    return result


def _tap(item: Fields) -> Tap:
    result = Tap(item.text("name", protocol.NAME), item.text("ifname", protocol.INTERFACE))
    item.done()
    return result


def _file(item: Fields, settings: Settings) -> File:
    name, path = item.text("name", protocol.NAME), item.text("path", _PATH)
    flags = item.choice("flags", ("r", "rw"))
    item.done()
    if path not in settings.openable_files:
        raise Refusal("FILE_REFUSED", f"{path[:200]!r} is not among the openable files of the settings")
    return File(name, path, os.O_RDONLY if flags == "r" else os.O_RDWR)


def _console(item: Fields, settings: Settings) -> Console:
    result = Console(
        item.text("name", protocol.NAME), item.integer("ring_bytes", 4096, 64 * 1024 * 1024, settings.ring_bytes)
    )
    item.done()
    return result


def _limits(fields: Fields) -> Limits:
    table = Fields(fields.table("limits", ".{1,20}", 3), "limits.")
    result = Limits(
        table.optional_integer("memory_bytes", 1024 * 1024, _LARGEST),
        table.optional_integer("cpu_millis", 10, 10_000_000),
        table.optional_integer("pids", 1, 4_000_000),
    )
    table.done()
    return result


def _rlimits(fields: Fields) -> dict[int, tuple[int, int]]:
    # A core would hold the guest's memory and fill the disk.
    result = {resource.RLIMIT_CORE: (0, 0)}
    for name, pair in fields.table("rlimits", "[A-Z]{2,10}", len(_RLIMITS)).items():
        if name not in _RLIMITS:
            raise fields.bad("rlimits", f"does not know {name}")
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(type(n) is int and -1 <= n <= _LARGEST for n in pair)
        ):
            raise fields.bad("rlimits", f"needs [soft, hard] for {name}")
        result[getattr(resource, f"RLIMIT_{name}")] = (pair[0], pair[1])
    return result


def _ambient(fields: Fields, settings: Settings, executable: str, uid: int) -> tuple[int, ...]:
    names = fields.texts("ambient_capabilities", "[a-z_]{1,30}", len(CAPABILITIES))
    allowed = settings.ambient_capabilities.get(executable, ())
    for name in names:
        if name not in allowed:
            raise Refusal("CAPABILITY_REFUSED", f"{name} is not allowed for {executable}")
    if names and (uid == 0 or settings.single_user):
        raise Refusal("CAPABILITY_REFUSED", "ambient capabilities are for a user that is not 0")
    return tuple(CAPABILITIES[name] for name in names)


def _names(fields: Fields, request: SpawnRequest) -> None:
    """Check that descriptor names are unique, that consoles name a socket, and that placeholders name a descriptor."""
    names = [item.name for item in request.sockets] + [item.name for item in request.taps]
    names += [item.name for item in request.files] + list(request.fds)
    if len(set(names)) != len(names):
        raise fields.bad("sockets, taps, files and fds", "have a name twice")
    sockets = {item.name for item in request.sockets}
    consoles = [item.name for item in request.consoles]
    if len(set(consoles)) != len(consoles) or not sockets.issuperset(consoles):
        raise fields.bad("consoles", "must each name one of the sockets, and no socket twice")
    for text in (*request.argv, *request.env.values()):
        for name in _FD.findall(text):
            if name not in names:
                raise fields.bad("argv", f"names the descriptor {name}, which is not there")
