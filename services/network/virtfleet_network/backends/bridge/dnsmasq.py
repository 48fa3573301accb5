"""dnsmasq of each network: started by the node's launcher, found again by a new service, started again when it dies.

Its directory below the state directory belongs to the service; only `var/` in it belongs to dnsmasq, which keeps
its leases and its pid there. Whoever takes dnsmasq over can write nothing that the service would follow.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from asyncinotify import Inotify, Mask, Watch

from virtfleet_network.backends.api import Listener, NetworkPlan
from virtfleet_network.backends.bridge import lease_file
from virtfleet_network.backends.bridge.dnsmasq_files import DaemonFiles, daemon_files, is_needed
from virtfleet_service.errors import BackendFailed, BackendUnreachable, DriverBroken, VirtfleetError
from virtfleet_service.launcher import (
    Connected,
    LauncherClient,
    LauncherError,
    LauncherUnavailable,
    Process,
    Spawn,
)

__all__ = ["Daemons"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

CAPABILITIES = ("net_admin", "net_raw", "net_bind_service")
READY_SECONDS = 10.0
TERM_SECONDS = 2.0
RESTART_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
"""How long to wait before the first, second, … attempt to start it again."""
STABLE_SECONDS = 30.0
SETTLE_SECONDS = 0.5
"""How long a lease file may stay empty or cut before that is believed."""
_LEASE_FILE_LIMIT_BYTES = 16 * 1024 * 1024
_GUEST_PREFIX = "dnsmasq-"
LEASES = "leases"
"""The name of the file that dnsmasq keeps its leases in."""


@dataclass(slots=True)
class _Daemon:
    plan: NetworkPlan
    incarnation: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    started: float = 0.0
    stale: bool = True
    """Whether the running process may not have read its lists of hosts as they are: nobody has told it since."""
    restarting: asyncio.Task[None] | None = None
    reading: asyncio.Task[None] | None = None
    touched: asyncio.Event = field(default_factory=asyncio.Event)
    watch: Watch | None = None


class Daemons:
    """Holds one dnsmasq for each running network that needs one.

    Args:
        launcher: The launcher of the node.
        executable: dnsmasq.
        directory: Below which each has a directory of its own.
        uid: The numeric user and group it runs as; None: the last one that the launcher may give.
        listener: Is told of leases and deaths.
    """

    def __init__(
        self, launcher: LauncherClient, executable: Path, directory: Path, uid: int | None, listener: Listener
    ) -> None:
        self._launcher = launcher
        self._executable = executable
        self._directory = directory
        self._wanted_uid = uid
        self._uid = 0
        self._listener = listener
        self._daemons: dict[str, _Daemon] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._inotify: _Watch | None = None

    async def open(self) -> None:
        """Begin to watch for deaths and leases."""
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._inotify = _Watch(self._file_changed)
        self._spawn_task(self._follow(), "launcher events")

    async def close(self) -> None:
        """End what runs in this process; the daemons run on."""
        tasks = [*self._tasks]
        for daemon in self._daemons.values():
            tasks += [task for task in (daemon.restarting, daemon.reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._inotify is not None:
            await self._inotify.close()

    async def problem(self) -> tuple[str, str]:
        """Return what keeps dnsmasq from running here, as a cause and a sentence; empty: nothing is known."""
        try:
            capabilities = await self._launcher.capabilities()
        except LauncherError as error:
            return "LAUNCHER_UNREACHABLE", f"the launcher does not answer: {error.message}"
        wanted = capabilities.uids[1] if self._wanted_uid is None else self._wanted_uid
        # Where the launcher can have no other user, everything runs as it does.
        self._uid = 0 if capabilities.single_user else wanted
        return await asyncio.to_thread(self._problem_of_files)

    def _problem_of_files(self) -> tuple[str, str]:
        if not self._executable.exists():
            return "DNSMASQ_MISSING", f"{self._executable} is missing: install dnsmasq-base"
        if self._uid:
            for folder in self._directory.absolute().parents:
                if folder.exists() and not folder.stat().st_mode & 0o001:
                    return (
                        "STATE_DIR_UNREACHABLE",
                        f"{folder} cannot be entered by dnsmasq's user {self._uid}: allow it (chmod o+x)",
                    )
        return "", ""

    async def ensure(self, plan: NetworkPlan, incarnation: str) -> bool:
        """Have dnsmasq of a network run with what the plan says. Succeeds if it does.

        Args:
            plan: The network.
            incarnation: Another value for another bridge: a process that is bound to the old one is replaced.

        Returns:
            Whether it was dead and should not have been.

        Raises:
            DriverBroken: It cannot run here.
            BackendFailed: It did not start; the message has the end of what it said.
            BackendUnreachable: The launcher is away.
        """
        if not is_needed(plan.spec):
            await self.stop(plan.uid)
            return False
        if plan.uid not in self._daemons:
            cause, problem = await self.problem()
            if cause == "LAUNCHER_UNREACHABLE":
                raise BackendUnreachable(problem, retry_delay_seconds=1.0, service="launcher")
            if problem:
                raise DriverBroken(problem, cause=cause)
        daemon = self._daemons.setdefault(plan.uid, _Daemon(plan, incarnation))
        daemon.plan, daemon.incarnation = plan, incarnation
        async with daemon.lock:
            return await self._ensure(daemon)

    async def _ensure(self, daemon: _Daemon) -> bool:
        plan = daemon.plan
        directory = self._directory / plan.uid
        files = daemon_files(plan, directory)
        await self._prepare(daemon, directory, files)
        spawn = self._spawn_request(plan, directory, files, daemon.incarnation)
        running = await self._asked(self._running(spawn.guest))
        died = running is None and daemon.started > 0
        if running is not None and running.token == spawn.token:
            if daemon.stale:
                await self._asked(self._launcher.kill(spawn.guest, "HUP"))
                daemon.stale = False
            if not daemon.started:
                daemon.started = asyncio.get_running_loop().time()
                self._read_soon(plan.uid)
            return False
        if running is not None:
            await self._asked(self._end(spawn.guest))
        await self._asked(self._start(daemon, spawn, directory))
        daemon.stale = False
        self._read_soon(plan.uid)
        return died

    async def _prepare(self, daemon: _Daemon, directory: Path, files: DaemonFiles) -> None:
        """Write what dnsmasq reads, and hear of what it writes.

        Raises:
            BackendFailed: The disk is full, or the kernel refuses otherwise.
        """
        assert self._inotify is not None  # noqa: S101  # open() made it
        try:
            hosts_changed, new = await asyncio.to_thread(self._write, directory, files)
            daemon.stale = daemon.stale or hosts_changed
            if new and daemon.watch is not None:
                # Of a directory that somebody has removed: nothing more is heard of that.
                self._inotify.remove(daemon.watch)
                daemon.watch = None
            if daemon.watch is None:
                daemon.watch = self._inotify.add(directory / "var", daemon.plan.uid)
        except OSError as error:
            raise _unwritable(directory, error) from error

    def _spawn_request(self, plan: NetworkPlan, directory: Path, files: DaemonFiles, incarnation: str) -> Spawn:
        argv = (str(self._executable), "--keep-in-foreground", f"--conf-file={directory}/dnsmasq.conf")
        identity = "\0".join([*argv, files.configuration, incarnation, str(self._uid)])
        return Spawn(
            guest=_guest(plan.uid),
            token=hashlib.sha256(identity.encode()).hexdigest()[:32],
            argv=argv,
            uid=self._uid or None,
            gid=self._uid or None,
            umask=0o027,
            ambient_capabilities=CAPABILITIES if self._uid else (),
        )

    def _write(self, directory: Path, files: DaemonFiles) -> tuple[bool, bool]:
        """Write the files that differ.

        Returns:
            Whether dnsmasq has to read lists again, and whether the directory that it writes to was made now.
        """
        var = directory / "var"
        directory.mkdir(mode=0o755, exist_ok=True)
        directory.chmod(0o755)
        new = not var.exists()
        var.mkdir(mode=0o750, exist_ok=True)
        leases = var / "leases"
        if self._uid:
            os.chown(var, self._uid, self._uid)
        if not leases.exists():
            descriptor = os.open(leases, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
            if self._uid:
                os.fchown(descriptor, self._uid, self._uid)
            os.close(descriptor)
        changed = False
        for name, text in (
            ("dnsmasq.conf", files.configuration),
            ("dhcp-hosts", files.dhcp_hosts),
            ("dns-hosts", files.dns_hosts),
        ):
            path = directory / name
            if path.exists() and path.read_text() == text:
                continue
            changed = changed or name != "dnsmasq.conf"
            fresh = directory / f".{name}"
            fresh.write_text(text)
            fresh.chmod(0o644)
            fresh.rename(path)
        return changed, new

    async def _running(self, guest: str) -> Process | None:
        try:
            found = await self._launcher.inspect(guest)
        except LauncherError as error:
            if error.reason == "NOT_FOUND":
                return None
            raise
        if found.state == "ended":
            with _without("NOT_FOUND"):
                await self._launcher.forget(guest)
            return None
        return found

    async def _start(self, daemon: _Daemon, spawn: Spawn, directory: Path) -> None:
        try:
            (directory / "var" / "pid").unlink(missing_ok=True)
        except OSError as error:
            # `var/` is dnsmasq's own: a folder may lie there, of whoever has taken it over.
            raise _unwritable(directory, error) from error
        daemon.ready.clear()
        await self._launcher.spawn(spawn)
        ended = asyncio.create_task(self._launcher.wait(spawn.guest))
        ready = asyncio.create_task(daemon.ready.wait())
        try:
            await asyncio.wait({ended, ready}, timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                daemon.started = asyncio.get_running_loop().time()
                return
            said = (await self._launcher.log(spawn.guest, 2000)).decode(errors="replace").strip()
            await self._end(spawn.guest)
        finally:
            for task in (ended, ready):
                task.cancel()
            await asyncio.gather(ended, ready, return_exceptions=True)
        raise BackendFailed(f"dnsmasq did not start: {said or 'it said nothing'}", tool="dnsmasq", said=said)

    async def _end(self, guest: str) -> None:
        """Stop a process and remove what is left of it; succeeds if there is none."""
        with _without("NOT_FOUND", "NOT_RUNNING"):
            await self._launcher.kill(guest, "TERM")
            try:
                async with asyncio.timeout(TERM_SECONDS):
                    await self._launcher.wait(guest)
            except TimeoutError:
                await self._launcher.kill(guest, "KILL")
                await self._launcher.wait(guest)
        with _without("NOT_FOUND"):
            await self._launcher.forget(guest)

    async def stop(self, network_uid: str) -> None:
        """Stop dnsmasq of a network; succeeds if there is none. Its leases stay.

        Raises:
            BackendFailed, BackendUnreachable: as `ensure`.
        """
        daemon = self._daemons.pop(network_uid, None)
        if daemon is not None:
            for task in (daemon.restarting, daemon.reading):
                if task is not None:
                    task.cancel()
            if daemon.watch is not None and self._inotify is not None:
                self._inotify.remove(daemon.watch)
            async with daemon.lock:
                await self._asked(self._end(_guest(network_uid)))
        elif (self._directory / network_uid).exists():
            await self._asked(self._end(_guest(network_uid)))

    async def forget(self, network_uid: str) -> None:
        """Remove the directory of a network with its leases."""
        await asyncio.to_thread(shutil.rmtree, self._directory / network_uid, ignore_errors=True)

    # Deaths.

    async def _follow(self) -> None:
        async for event in self._launcher.events():
            if isinstance(event, Connected):
                # Another launcher, or the first: what ended meanwhile is told next, and what it never knew is found by
                # a look.
                self._listener.something_changed()
            elif event.exit.guest.startswith(_GUEST_PREFIX):
                self._ended(event.exit.guest.removeprefix(_GUEST_PREFIX))

    def _ended(self, network_uid: str) -> None:
        daemon = self._daemons.get(network_uid)
        if daemon is None or not daemon.started or (daemon.restarting is not None and not daemon.restarting.done()):
            return
        daemon.restarting = asyncio.create_task(self._restart(daemon), name=f"restart dnsmasq of {network_uid}")

    async def _restart(self, daemon: _Daemon) -> None:
        """Start it again, at once the first time, later each time it fails or soon dies again."""
        loop = asyncio.get_running_loop()
        if loop.time() - daemon.started > STABLE_SECONDS:
            daemon.failures = 0
        while True:
            await asyncio.sleep(RESTART_SECONDS[min(daemon.failures, len(RESTART_SECONDS) - 1)])
            try:
                async with daemon.lock:
                    died = await self._ensure(daemon)
            except VirtfleetError as error:
                daemon.failures += 1
                _log.warning("dnsmasq of %s does not start: %s", daemon.plan.name, error)
                self._listener.daemon_failed(daemon.plan.uid, error.message)
                continue
            if died:
                daemon.failures += 1
                self._listener.daemon_restarted(daemon.plan.uid, "dnsmasq had died and was started again")
            return

    # Leases.

    def _file_changed(self, network_uid: str, name: str) -> None:
        daemon = self._daemons.get(network_uid)
        if daemon is None:
            return
        if name == "pid" and (self._directory / network_uid / "var" / "pid").exists():
            daemon.ready.set()
        elif name == LEASES:
            self._read_soon(network_uid)

    def _read_soon(self, network_uid: str) -> None:
        daemon = self._daemons.get(network_uid)
        if daemon is None:
            return
        daemon.touched.set()
        if daemon.reading is None or daemon.reading.done():
            daemon.reading = asyncio.create_task(self._read(daemon), name=f"leases of {network_uid}")

    async def _read(self, daemon: _Daemon) -> None:
        path = self._directory / daemon.plan.uid / "var" / "leases"
        while daemon.touched.is_set():
            daemon.touched.clear()
            text = await asyncio.to_thread(_read_text, path)
            if text is None:
                # What cannot be read says nothing: the leases that are known stay.
                return
            if not lease_file.is_complete(text):
                # It may be in the middle of a write; then it changes again at once.
                with suppress(TimeoutError):
                    async with asyncio.timeout(SETTLE_SECONDS):
                        await daemon.touched.wait()
                    continue
            self._listener.leases_changed(daemon.plan.uid, lease_file.parse(text))

    def _spawn_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)

    async def _asked(self, answer: Coroutine[Any, Any, T]) -> T:
        """Await an answer of the launcher; its refusals become errors that callers know."""
        try:
            return await answer
        except LauncherUnavailable as error:
            raise BackendUnreachable(
                f"the launcher does not answer: {error.message}", retry_delay_seconds=1.0, service="launcher"
            ) from error
        except LauncherError as error:
            message = f"the launcher does not start dnsmasq: {error.message} ({error.reason})"
            if error.reason in ("EXEC_FAILED", "EXECUTABLE_REFUSED", "UID_REFUSED", "CAPABILITY_REFUSED"):
                raise DriverBroken(message, cause=error.reason) from error
            raise BackendFailed(message, cause=error.reason) from error


def _unwritable(directory: Path, error: OSError) -> BackendFailed:
    return BackendFailed(
        f"the files of dnsmasq in {directory} cannot be made: {error.strerror or error}",
        tool="dnsmasq",
        path=directory,
        cause=errno.errorcode.get(error.errno or 0, "UNKNOWN"),
    )


def _guest(network_uid: str) -> str:
    return _GUEST_PREFIX + network_uid


def _read_text(path: Path) -> str | None:
    """Read a file that dnsmasq owns: through no link, nothing but a file, with a bound; None: it cannot be read now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no file", str(path))
            return file.read(_LEASE_FILE_LIMIT_BYTES).decode(errors="replace")
    except OSError as error:
        _log.warning("the leases in %s cannot be read: %s", path, error)
        return None


@contextmanager
def _without(*reasons: str) -> Iterator[None]:
    """Pass over refusals of the launcher with these reasons: what was to be done is done already."""
    try:
        yield
    except LauncherError as error:
        if error.reason not in reasons:
            raise


class _Watch:
    """Tells of writes in the directories that belong to dnsmasq."""

    def __init__(self, changed: Callable[[str, str], None]) -> None:
        self._inotify = Inotify()
        self._changed = changed
        self._networks: dict[Watch, str] = {}
        self._task = asyncio.create_task(self._run(), name="inotify of dnsmasq")

    def add(self, directory: Path, network_uid: str) -> Watch:
        """Watch a directory for a network."""
        watch = self._inotify.add_watch(directory, Mask.MODIFY | Mask.CLOSE_WRITE | Mask.MOVED_TO)
        self._networks[watch] = network_uid
        return watch

    def remove(self, watch: Watch) -> None:
        """End watching a directory; one that has been removed is no longer watched anyway."""
        if self._networks.pop(watch, None) is not None:
            with suppress(OSError):
                self._inotify.rm_watch(watch)

    async def close(self) -> None:
        """End watching all."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._inotify.close()

    async def _run(self) -> None:
        async for event in self._inotify:
            if event.mask & Mask.Q_OVERFLOW:
                for network_uid in self._networks.values():
                    self._changed(network_uid, LEASES)
                continue
            network_uid = self._networks.get(event.watch, "") if event.watch is not None else ""
            if network_uid and event.name is not None:
                self._changed(network_uid, str(event.name))
