"""The composition root: settings, lock, adoption, sockets, then serve until SIGTERM; the guests stay."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import socket
import sys
from collections.abc import Callable

from virtfleet_launcher import birth, report
from virtfleet_launcher.cgroups import Cgroups
from virtfleet_launcher.layers import permitted_groups, probe
from virtfleet_launcher.loop import Loop
from virtfleet_launcher.processes import Processes
from virtfleet_launcher.server import Listener
from virtfleet_launcher.settings import Settings, SettingsError, read
from virtfleet_launcher.verbs import Verbs

__all__ = ["main"]

_EXIT_REFUSED = 1
_EXIT_USAGE = 2
_EXIT_LOCKED = 3


def main(arguments: list[str] | None = None) -> int:
    """Run the launcher and return the exit status."""
    _hold_standard_descriptors()
    try:
        settings, show = read(sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        report.error("the settings cannot be used", error=str(error))
        return _EXIT_USAGE
    if show:
        sys.stdout.write(show.rstrip("\n") + "\n")
        return 0
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(os.path.join(settings.run_dir, "guests"), mode=0o700, exist_ok=True)
            lock = stack.enter_context(open(os.path.join(settings.run_dir, "lock"), "a", encoding="ascii"))
            try:
                # A record lock: unlike flock's it is not shared with a child between fork and exec.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                report.error("another launcher serves this run directory", run_dir=settings.run_dir)
                return _EXIT_LOCKED
            serve = _start(settings)
        except OSError as error:
            report.error("cannot start", error=str(error), run_dir=settings.run_dir)
            return _EXIT_REFUSED
        serve()
    return 0


def _hold_standard_descriptors() -> None:
    """Open the first three descriptors if whoever started us has closed them.

    Else the lock or a socket gets the number that the log is written to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _start(settings: Settings) -> Callable[[], None]:
    """Adopt what runs, open the sockets, and return what serves until SIGTERM.

    Raises:
        OSError: something in the run directory cannot be used.
    """
    descriptor_limit = birth.raise_descriptor_limit()
    loop = Loop()
    cgroups = Cgroups(loop, settings.cgroup_parent)
    layers = probe(settings, cgroups)
    processes = Processes(loop, settings, cgroups, descriptor_limit)
    processes.adopt()
    verbs = Verbs(settings, layers, permitted_groups(settings), processes)
    listeners = []
    for client in settings.clients:
        name, _, owner = client.partition(":")
        path = os.path.join(settings.run_dir, f"{name}.sock")
        listeners.append(Listener(loop, path, name, int(owner) if owner else None, verbs.handle))
    impossible = {name: layer.reason for name, layer in layers.items() if not layer.possible}
    report.info("ready", pid=os.getpid(), run_dir=settings.run_dir, impossible=impossible)
    # What is there now stays: measured against it, the collector would let the cycles of many dead processes pile up.
    gc.collect()
    gc.freeze()

    def serve() -> None:
        _notify("READY=1")
        loop.run()
        _notify("STOPPING=1")
        for listener in listeners:
            listener.close()
        processes.stop()
        report.info("stopped; the processes stay")

    return serve


def _notify(state: str) -> None:
    """Tell systemd, where it started us."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line, contextlib.suppress(OSError):
            line.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
