"""From a checked request to a running process: descriptors, fork into the cgroup, the child until its exec."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from virtfleet_launcher import kernel, rundir
from virtfleet_launcher.protocol import Refusal
from virtfleet_launcher.requests import SpawnRequest
from virtfleet_launcher.rundir import RunDirectory

__all__ = ["EXEC_ERROR", "STAGES", "Birth", "Limit", "bear", "descriptors", "raise_descriptor_limit", "try_in_child"]

#: What the child was doing when it failed, in the order in which it does it.
STAGES = ("session", "pid_file", "descriptors", "rlimits", "user", "capabilities", "cwd", "exec")
#: Stage and errno, on the pipe that a successful exec closes without a word.
EXEC_ERROR = struct.Struct("ii")

Limit = tuple[int, int]
#: Python's own SIGPIPE and SIGXFSZ, and what whoever started the launcher ignores: a shell's SIGINT and SIGQUIT in the
#: background.
_IGNORED = tuple(number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN)
_LAUNCHER_HANDLES = (signal.SIGTERM, signal.SIGINT)


class Birth(NamedTuple):
    """A child between fork and exec."""

    pid: int
    pidfd: int
    start_time: int
    exec_pipe: int
    in_cgroup: bool


def raise_descriptor_limit() -> Limit:
    """Raise the launcher's own limit as far as it goes and return the one that children get back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def descriptors(
    stack: ExitStack, request: SpawnRequest, directory: RunDirectory, passed: list[int]
) -> list[tuple[str, int]]:
    """Open all that the child gets by name, in the order of its numbers; the stack closes it.

    Raises:
        Refusal: SOCKET_FAILED, TAP_FAILED or FILE_FAILED with errno and name.
    """
    result: list[tuple[str, int]] = []

    def add(reason: str, name: str, make: Callable[[], int]) -> None:
        try:
            descriptor = make()
        except OSError as error:
            raise _failed(reason, name, error) from error
        stack.callback(os.close, descriptor)
        result.append((name, descriptor))

    for item in request.sockets:
        make = partial(_listener, directory.file(item.name), item.mode, item.backlog)
        add("SOCKET_FAILED", item.name, make)
    for tap in request.taps:
        add("TAP_FAILED", tap.name, partial(kernel.open_tap, tap.ifname))
    for file in request.files:
        flags = file.flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY
        add("FILE_FAILED", file.name, partial(os.open, file.path, flags))
    result += zip(request.fds, passed, strict=True)
    return result


def _listener(path: str, mode: int, backlog: int) -> int:
    # The child polls or blocks as it likes: the listener is handed over as the kernel made it.
    listener: socket.socket = rundir.bind(path, mode, backlog)
    return listener.detach()


def _failed(reason: str, name: str, error: OSError) -> Refusal:
    code = errno.errorcode.get(error.errno or 0, "")
    return Refusal(reason, f"{name}: {error.strerror or error}", name=name, errno=code)


def bear(
    request: SpawnRequest,
    directory: RunDirectory,
    named: list[tuple[str, int]],
    log: int,
    cgroup: int | None,
    boot: str,
    descriptor_limit: Limit,
) -> Birth:
    """Fork the child; its exec's fate is told by the pipe: silence and end is success.

    Raises:
        OSError: the kernel will not fork. Nothing is left.
    """
    numbers = {name: 3 + index for index, (name, _) in enumerate(named)}
    argv = [request.substitute(text, numbers) for text in request.argv]
    env = {name: request.substitute(text, numbers) for name, text in request.env.items()}
    limits = {resource.RLIMIT_NOFILE: descriptor_limit, **request.rlimits}
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # No handler of the launcher may run in the child.
    before = kernel.block_signals()
    try:
        clone = kernel.clone(cgroup)
        if clone.pid == 0:
            _child(request, argv, env, limits, [null, log, log, *(fd for _, fd in named)], write_end, directory, boot)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        kernel.set_signal_mask(before)
        os.close(write_end)
        os.close(null)
    return Birth(clone.pid, clone.pidfd, kernel.start_time(clone.pid), read_end, clone.in_cgroup)


def _child(
    request: SpawnRequest,
    argv: list[str],
    env: dict[str, str],
    limits: dict[int, Limit],
    inherited: list[int],
    report: int,
    directory: RunDirectory,
    boot: str,
) -> None:
    """Become the program; never returns."""
    stage = 0
    try:
        signal.set_wakeup_fd(-1)
        for number in (*_IGNORED, *_LAUNCHER_HANDLES):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        stage = 1
        # By the child, so that a launcher that dies right now leaves nobody unknown.
        pid = os.getpid()
        text = f'{{"pid":{pid},"start_time":{kernel.start_time(pid)},"boot_id":"{boot}"}}\n'
        directory.write("pid", text.encode())
        stage = 2
        report = _arrange(inherited, report)
        stage = 3
        for limit, pair in limits.items():
            resource.setrlimit(limit, pair)
        os.umask(request.umask)
        stage = 4
        if request.change_user:
            if request.ambient_capabilities:
                kernel.keep_capabilities()
            change_user(request.uid, request.gid, request.groups)
        stage = 5
        if request.ambient_capabilities:
            kernel.ambient(list(request.ambient_capabilities))
        if request.no_new_privs:
            kernel.no_new_privs()
        stage = 6
        os.chdir(request.cwd)
        stage = 7
        kernel.set_signal_mask(kernel.NO_SIGNALS)
        os.execve(argv[0], argv, env)  # noqa: S606 - the purpose of this program
    except OSError as error:
        os.write(report, EXEC_ERROR.pack(stage, error.errno or errno.EIO))
    except BaseException:  # noqa: BLE001 - a child that returned into the launcher's loop would be a second launcher
        os.write(report, EXEC_ERROR.pack(stage, errno.EINVAL))
    finally:
        os._exit(127)


def change_user(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Become another user for good."""
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _arrange(inherited: list[int], report: int) -> int:
    """Give the inherited descriptors the numbers from 0, close all others, and return the report's new number."""
    count = len(inherited)
    # First out of the way: a number that is needed may be one that is to be moved.
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, count + 1) for descriptor in (*inherited, report)]
    for number, descriptor in enumerate(high[:-1]):
        os.dup2(descriptor, number, inheritable=True)
    os.dup2(high[-1], count, inheritable=False)
    kernel.close_from(count + 1)
    return count


def try_in_child(action: Callable[[], None], cgroup: int | None = None) -> tuple[str, bool, bool]:
    """Try something in a child that ends at once.

    Returns what went wrong (empty: nothing), whether the child was in the cgroup, and whether its exit status could be
    read the way a stranger reads it.
    """
    before = kernel.block_signals()
    try:
        clone = kernel.clone(cgroup)
        if clone.pid == 0:
            code = 0
            try:
                action()
            except OSError as error:
                code = error.errno or errno.EIO
            except BaseException:  # noqa: BLE001 - as in _child
                code = errno.EINVAL
            finally:
                os._exit(min(code, 255))
    finally:
        kernel.set_signal_mask(before)
    _, status = os.waitpid(clone.pid, 0)
    readable = kernel.exit_status(clone.pidfd) is not None
    os.close(clone.pidfd)
    code = os.waitstatus_to_exitcode(status)
    return (os.strerror(code) if code > 0 else ""), clone.in_cgroup, readable
