"""What a QEMU binary is and can do: asked of it once, over QMP on a machine without anything, and kept on disk.

What was found is good for as long as the binary has the same size and time of change.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtfleet_compute.drivers.qemu.monitor import Monitor, MonitorLost
from virtfleet_service import process
from virtfleet_service.errors import BackendFailed, DriverBroken, HypervisorFailed, OperationTimedOut

_log = logging.getLogger(__name__)

OLDEST_VERSION = (7, 0)

PROBE_SECONDS = 6.0

_FORMAT = 2
_SETS = ("cpu_features", "maximum_features")
_QUESTIONS: Sequence[tuple[str, Mapping[str, object] | None]] = (
    ("query-machines", None),
    ("query-cpu-definitions", None),
    ("query-cpu-model-expansion", {"type": "static", "model": {"name": "max"}}),
    ("query-qmp-schema", None),
)


@dataclass(frozen=True, slots=True)
class Emulator:
    """Is a QEMU binary as it describes itself."""

    binary: str
    version: str
    """`7.2.22`."""
    machines: Mapping[str, int]
    """How many processors each versioned machine type takes."""
    aliases: Mapping[str, str]
    """The versioned machine type that a name without version stands for."""
    cpu_models: Mapping[str, str]
    """The versioned model that each model stands for."""
    cpu_features: frozenset[str]
    """Names of features that a processor may have."""
    maximum_features: frozenset[str]
    """Those of them that the largest processor has that QEMU can emulate."""
    has_sandbox: bool
    """Whether it was built with seccomp."""
    has_io_uring: bool


def default_binary(arch: str) -> str:
    """Return the system's QEMU for an architecture; the first place where one is, else the usual one."""
    places = [Path(folder) / f"qemu-system-{arch}" for folder in ("/usr/bin", "/usr/local/bin", "/usr/libexec")]
    return str(next((place for place in places if place.exists()), places[0]))


async def probe(binary: str, state_directory: Path) -> Emulator:
    """Return what a binary is, asked of it unless that is on record.

    Raises:
        DriverBroken: It is missing, does not run, or is too old.
    """
    stamp = stamp_of(binary)
    record = state_directory / "emulator.json"
    kept = _read(record, stamp)
    if kept is not None:
        return kept
    emulator = await _ask(binary)
    fields = dataclasses.asdict(emulator)
    for name in _SETS:
        fields[name] = sorted(fields[name])
    write_record(record, {"stamp": stamp, "emulator": fields})
    return emulator


def stamp_of(binary: str) -> list[object]:
    """Return what tells a binary from the one that takes its place.

    Raises:
        DriverBroken: It is missing.
    """
    try:
        found = os.stat(binary)  # noqa: PTH116  # the text that the launcher compares, not a path of ours
    except OSError as error:
        raise _broken(f"there is no QEMU at {binary} ({error.strerror}); install qemu-system-x86") from error
    return [_FORMAT, binary, found.st_size, found.st_mtime_ns]


def write_record(record: Path, value: Mapping[str, object]) -> None:
    """Write a small file of JSON that is there as a whole or not at all. It saves time: a full disk is no obstacle."""
    fresh = record.with_name(f"{record.name}.{os.getpid()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(value))
        fresh.replace(record)
    except OSError as error:
        _log.warning("what was found is asked again at the next start: %s", error)
        fresh.unlink(missing_ok=True)


def _read(record: Path, stamp: list[object]) -> Emulator | None:
    try:
        value = json.loads(record.read_bytes())
        if value["stamp"] != stamp:
            return None
        fields = value["emulator"]
        return Emulator(**{**fields, **{name: frozenset(fields[name]) for name in _SETS}})
    except (OSError, ValueError, KeyError, TypeError):
        # Whatever is wrong with the record: it can be made again.
        return None


async def _ask(binary: str) -> Emulator:
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", "tcg"]
    # Not stdin and stdout: QEMU quits without waiting until somebody has read what it said.
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    argv += ["-chardev", f"socket,id=m,fd={theirs.fileno()}", "-mon", "chardev=m,mode=control"]
    running = asyncio.create_task(process.run(argv, timeout_seconds=PROBE_SECONDS, pass_fds=[theirs.fileno()]))
    # Once it has its own; with this one open an end of QEMU would not be the end of the line.
    running.add_done_callback(lambda _: theirs.close())
    try:
        return await _converse(binary, ours)
    except MonitorLost as error:
        why = str(error)
        try:
            why = f"exit code {(await running).exit_code}: {running.result().said}"
        except (BackendFailed, OperationTimedOut) as ended:
            why = str(ended)
        raise _broken(f"{binary} cannot be asked what it is: {why}") from error
    except (HypervisorFailed, ValueError, KeyError, TypeError, IndexError) as error:
        raise _broken(f"{binary} does not answer like QEMU: {type(error).__name__}: {error}") from error
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _converse(binary: str, line: socket.socket) -> Emulator:
    monitor = await Monitor.connect(
        line, timeout_seconds=PROBE_SECONDS, on_event=lambda _: None, on_lost=lambda _: None
    )
    try:
        version = await monitor.execute("query-version", timeout_seconds=PROBE_SECONDS)
        answers = [
            await monitor.execute(command, arguments, timeout_seconds=PROBE_SECONDS)
            for command, arguments in _QUESTIONS
        ]
        return _understand(binary, version["qemu"], answers, has_sandbox=await _has_sandbox(monitor))
    finally:
        await monitor.close()


async def _has_sandbox(monitor: Monitor) -> bool:
    """Tell whether QEMU knows `-sandbox`: it does if it was built with it and may make the system call `seccomp`."""
    try:
        arguments = {"option": "sandbox"}
        return bool(await monitor.execute("query-command-line-options", arguments, timeout_seconds=PROBE_SECONDS))
    except HypervisorFailed:
        # "invalid option name": an option that it does not have.
        return False


def _understand(binary: str, version: Mapping[str, int], answers: Sequence[Any], *, has_sandbox: bool) -> Emulator:
    machines, models, expansion, schema = answers
    if (version["major"], version["minor"]) < OLDEST_VERSION:
        raise _broken(f"{binary} is version {version['major']}.{version['minor']}; 7.0 or newer is needed")
    properties = expansion["model"]["props"] if expansion else {}
    return Emulator(
        binary=binary,
        version=f"{version['major']}.{version['minor']}.{version['micro']}",
        machines={machine["name"]: int(machine["cpu-max"]) for machine in machines if machine["name"] != "none"},
        aliases={machine["alias"]: machine["name"] for machine in machines if "alias" in machine},
        cpu_models={model["name"]: model.get("alias-of", model["name"]) for model in models},
        cpu_features=frozenset(name for name, value in properties.items() if isinstance(value, bool)),
        maximum_features=frozenset(name for name, value in properties.items() if value is True),
        has_sandbox=has_sandbox,
        has_io_uring=any({"threads", "native", "io_uring"} <= set(kind.get("values", ())) for kind in schema or ()),
    )


def _broken(text: str) -> DriverBroken:
    return DriverBroken(text, driver="qemu", cause=text)
