"""The system calls that Python's standard library does not offer, and the shapes of what they return.

Everything here raises `OSError` with the kernel's errno, as the `os` module does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
from typing import NamedTuple

__all__ = [
    "CAPABILITIES",
    "EXIT_INFO_BIT",
    "NO_SIGNALS",
    "Clone",
    "ambient",
    "block_signals",
    "boot_id",
    "clone",
    "close_from",
    "exit_status",
    "inotify",
    "inotify_watch",
    "keep_capabilities",
    "no_new_privs",
    "open_tap",
    "seccomp_available",
    "set_signal_mask",
    "start_time",
    "zombie",
]

# Calls keep the interpreter's lock (PyDLL): after a raw clone nobody else exists in the child to take or give it.
_libc = ctypes.PyDLL(None, use_errno=True)

_SYS_CLONE3 = 435
_SYS_CLOSE_RANGE = 436
_CLONE_PIDFD = 0x1000
_CLONE_INTO_CGROUP = 0x200000000
_SIGCHLD = 17

_PR_SET_KEEPCAPS = 8
_PR_GET_SECCOMP = 21
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000

# _IOWR(0xFF, 11, struct pidfd_info) with the first published size of 64 bytes.
_PIDFD_GET_INFO = 0xC040FF0B
EXIT_INFO_BIT = 1 << 3
_EXIT_CODE_AT = 60

# The size of sigset_t.
_SIGNAL_SET_BYTES = 128
#: The mask of a thread that blocks none.
NO_SIGNALS = bytes(_SIGNAL_SET_BYTES)

# Fields of /proc/PID/stat, counted from the command's closing bracket.
_USER_TICKS = 11
_STARTED = 19
_EXIT_CODE = 49

_IN_MODIFY = 0x2
_IN_NONBLOCK_CLOEXEC = 0o2004000

#: Names as in capabilities(7), lower case and without "cap_".
CAPABILITIES = {
    "net_bind_service": 10,
    "net_broadcast": 11,
    "net_admin": 12,
    "net_raw": 13,
    "ipc_lock": 14,
    "sys_nice": 23,
    "sys_resource": 24,
}


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Clone(NamedTuple):
    """What `clone` gives: in the child pid is 0 and pidfd -1."""

    pid: int
    pidfd: int
    in_cgroup: bool


def clone(cgroup_fd: int | None) -> Clone:
    """Fork, into the cgroup when one is given, and return a pidfd with it.

    Without clone3 (old kernels, seccomp filters of containers) it forks and opens the pidfd, which is as good as
    long as the parent alone reaps. A kernel that refuses the cgroup gets a second call without it; the caller reads
    `in_cgroup`.

    Raises:
        OSError: the kernel will not fork.
    """
    pidfd = ctypes.c_int(-1)
    attempts = ([cgroup_fd] if cgroup_fd is not None else []) + [None]
    for cgroup in attempts:
        flags = _CLONE_PIDFD | (_CLONE_INTO_CGROUP if cgroup is not None else 0)
        arguments = ctypes.create_string_buffer(
            struct.pack("11Q", flags, ctypes.addressof(pidfd), 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, cgroup or 0), 88
        )
        pid = _libc.syscall(ctypes.c_long(_SYS_CLONE3), arguments, ctypes.c_long(88))
        if pid >= 0:
            return Clone(pid, pidfd.value if pid else -1, cgroup is not None)
        number = ctypes.get_errno()
        if number in (errno.EAGAIN, errno.ENOMEM):
            raise OSError(number, os.strerror(number))
    pid = os.fork()
    return Clone(pid, os.pidfd_open(pid) if pid else -1, in_cgroup=False)


def close_from(first: int) -> None:
    """Close every descriptor from `first` upwards."""
    if _libc.syscall(ctypes.c_long(_SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), 0) == 0:
        return
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            # The directory's own descriptor is in the list and is gone by now.
            with contextlib.suppress(OSError):
                os.close(int(name))


def block_signals() -> bytes:
    """Block all signals of this thread and return its mask before, for `set_signal_mask`.

    As `signal.pthread_sigmask` does, without making an enumeration's member of each signal: a hundredth of its time.
    """
    before = ctypes.create_string_buffer(_SIGNAL_SET_BYTES)
    _mask(signal.SIG_BLOCK, b"\xff" * _SIGNAL_SET_BYTES, before)
    return before.raw


def set_signal_mask(mask: bytes) -> None:
    """Block these signals of this thread and no others."""
    _mask(signal.SIG_SETMASK, mask, None)


def _mask(how: signal.Sigmasks, mask: bytes, before: ctypes.Array[ctypes.c_char] | None) -> None:
    number = _libc.pthread_sigmask(ctypes.c_int(how), mask, before)
    if number:
        raise OSError(number, os.strerror(number))


def no_new_privs() -> None:
    """Give up for good that an exec of this process or its children can gain privileges."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def keep_capabilities() -> None:
    """Keep the permitted capabilities over the coming change of user; an exec ends it."""
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))


def ambient(capabilities: list[int]) -> None:
    """Reduce the capability sets of this process to these and pass them on through exec.

    To be called after the change of user and with `keep_capabilities` before it.
    """
    low = sum(1 << number for number in capabilities if number < 32)
    high = sum(1 << (number - 32) for number in capabilities if number >= 32)
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(struct.pack("6I", low, low, low, high, high, high), 24)
    _check(_libc.capset(header, data))
    for number in capabilities:
        _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0))


def seccomp_available() -> bool:
    """Tell whether this kernel has seccomp, which QEMU's own sandbox needs."""
    return bool(_libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0)


def exit_status(pidfd: int) -> int | None:
    """Read the wait status of a process that anybody reaped; None where the kernel (before 6.15) keeps none."""
    buffer = bytearray(struct.pack("Q", EXIT_INFO_BIT) + bytes(56))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.ESRCH):
            return None
        raise
    if not struct.unpack_from("Q", buffer)[0] & EXIT_INFO_BIT:
        return None
    status: int = struct.unpack_from("i", buffer, _EXIT_CODE_AT)[0]
    return status


def open_tap(interface: str) -> int:
    """Open a queue of an existing tap as QEMU wants it: no packet information, virtio header in front.

    Raises:
        OSError: ENODEV when no such interface exists (TUNSETIFF alone would make a new one that nobody bridged).
    """
    index = _interface_index(interface)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", interface.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        if _interface_index(interface) != index:
            raise OSError(errno.ENODEV, "the interface was replaced while it was opened")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _interface_index(interface: str) -> int:
    index: int = _libc.if_nametoindex(interface.encode())
    if index == 0:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), interface)
    return index


def inotify() -> int:
    """Make a non-blocking inotify descriptor."""
    return _check(_libc.inotify_init1(_IN_NONBLOCK_CLOEXEC))


def inotify_watch(descriptor: int, path: str) -> int:
    """Watch a file for writes and return the watch's number."""
    return _check(_libc.inotify_add_watch(descriptor, os.fsencode(path), ctypes.c_uint32(_IN_MODIFY)))


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def zombie(pid: int, started: int) -> tuple[int, float] | None:
    """Return wait status and user seconds of a dead process that its parent has not reaped yet, else None.

    An init may take seconds to reap; this does not wait for it, and works for the children of others.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
        if fields[0] not in (b"Z", b"X") or int(fields[_STARTED]) != started:
            return None
        status = int(fields[_EXIT_CODE])
        if status == 0:
            # Without the right to look the kernel says 0 as well; reading this needs the same right.
            with open(f"/proc/{pid}/io", "rb") as file:
                file.read()
    except OSError:
        return None
    return status, int(fields[_USER_TICKS]) / os.sysconf("SC_CLK_TCK")


def writer_of(path: str) -> int:
    """Return the pid of the session leader whose standard output is a file; 0: there is none.

    Raises:
        OSError: there is no such file.
    """
    meant = os.stat(path)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            found = os.stat(f"/proc/{name}/fd/1")
            if (found.st_dev, found.st_ino) == (meant.st_dev, meant.st_ino) and os.getsid(int(name)) == int(name):
                return int(name)
        except OSError:
            # Gone meanwhile, or none of ours.
            continue
    return 0


def start_time(pid: int) -> int:
    """Return the start of a process in clock ticks since boot; with the pid and boot id it names one process.

    Raises:
        OSError: there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The command's name may hold blanks and brackets: fields are counted from the last bracket.
        return int(file.read().rsplit(b")", 1)[1].split()[_STARTED])
