"""The guests of the test driver: a packed record each, so that a hundred thousand of them fit into a small process."""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2

State = domain_pb2.DomainState
Reason = domain_pb2.DomainStateReason

_RECORD = struct.Struct("<BBq16sqiI")


@dataclass(frozen=True, slots=True)
class Shape:
    """Is what guests of equal specs share."""

    disks: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    obeys_power_button: bool = True
    power_button_seconds: float = 0.0
    crash_seconds: float | None = None
    power_off_seconds: float | None = None
    reboots: bool = True
    """Whether a reboot that the guest begins boots it again (`on_exit.reboot` is not STOP)."""


class Guest(NamedTuple):
    """Is one guest, unpacked."""

    state: int
    reason: int
    start_ns: int
    runtime: bytes
    memory_bytes: int
    vcpu_count: int
    shape_number: int

    @property
    def runtime_id(self) -> str:
        """The runtime id as the service gave it."""
        return str(uuid.UUID(bytes=self.runtime))


def _runtime_bytes(runtime_id: str) -> bytes:
    return uuid.UUID(runtime_id).bytes


def shape_of(spec: domain_spec_pb2.DomainSpec) -> Shape:
    """Return what a spec means for the behaviour of a guest."""
    options = spec.test
    return Shape(
        disks=tuple(sorted(spec.disks)),
        interfaces=tuple(sorted(spec.interfaces)),
        obeys_power_button=options.obeys_power_button if options.HasField("obeys_power_button") else True,
        power_button_seconds=options.power_button_delay.ToNanoseconds() / 1e9,
        crash_seconds=options.crash_delay.ToNanoseconds() / 1e9 if options.HasField("crash_delay") else None,
        power_off_seconds=options.power_off_delay.ToNanoseconds() / 1e9
        if options.HasField("power_off_delay")
        else None,
        reboots=spec.on_exit.reboot != domain_spec_pb2.EXIT_ACTION_STOP,
    )


class Guests:
    """Holds the guests by uid. With a file, what runs is found again by the next instance of the service."""

    def __init__(self) -> None:
        self._records: dict[str, bytes] = {}
        self._shapes: list[Shape] = []
        self._numbers: dict[Shape, int] = {}
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._records)

    def get(self, uid: str) -> Guest | None:
        """Return a guest; None if there is none, nor a record of its end."""
        record = self._records.get(uid)
        return Guest._make(_RECORD.unpack(record)) if record is not None else None

    def shape(self, guest: Guest) -> Shape:
        """Return the shape of a guest."""
        return self._shapes[guest.shape_number]

    def items(self) -> Iterator[tuple[str, Guest]]:
        """Return all guests with their uids."""
        for uid, record in self._records.items():
            yield uid, Guest._make(_RECORD.unpack(record))

    def start(
        self, uid: str, spec: domain_spec_pb2.DomainSpec, runtime_id: str, start_ns: int, *, paused: bool
    ) -> Guest:
        """Make a guest."""
        guest = Guest(
            state=State.DOMAIN_STATE_PAUSED if paused else State.DOMAIN_STATE_RUNNING,
            reason=Reason.DOMAIN_STATE_REASON_STARTED_PAUSED if paused else Reason.DOMAIN_STATE_REASON_BOOTED,
            start_ns=start_ns,
            runtime=_runtime_bytes(runtime_id),
            memory_bytes=spec.memory.current_bytes,
            vcpu_count=spec.cpu.vcpu_count,
            shape_number=self._number(shape_of(spec)),
        )
        self._keep(uid, guest)
        return guest

    def start_another(self, uid: str, like: Guest, runtime_id: str) -> None:
        """Make a guest that differs from one in its identity alone."""
        self._keep(uid, like._replace(runtime=bytes.fromhex(runtime_id.replace("-", ""))))

    def change(self, uid: str, guest: Guest, state: int, reason: int) -> Guest:
        """Give a guest another state."""
        changed = guest._replace(state=state, reason=reason)
        self._keep(uid, changed)
        return changed

    def update(self, uid: str, guest: Guest, spec: domain_spec_pb2.DomainSpec) -> None:
        """Give a guest the sizes and the behaviour of a changed spec."""
        self._keep(
            uid,
            guest._replace(
                memory_bytes=spec.memory.current_bytes,
                vcpu_count=spec.cpu.vcpu_count,
                shape_number=self._number(shape_of(spec)),
            ),
        )

    def forget(self, uid: str) -> None:
        """Forget a guest and its end."""
        if self._records.pop(uid, None) is not None and self._file is not None:
            self._append(self._file, [uid])

    def open(self, path: Path) -> None:
        """Read what ran when the file was last written, and write every change to it from now on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_bytes().splitlines() if path.exists() else ():
            self._read(line)
        fresh = path.with_name(path.name + ".new")
        with fresh.open("wb") as file:
            for uid, guest in self.items():
                self._append(file, self._line(uid, guest))
        fresh.replace(path)
        self._file = path.open("ab", buffering=0)

    def close(self) -> None:
        """End the writing of changes."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _number(self, shape: Shape) -> int:
        number = self._numbers.get(shape)
        if number is None:
            number = self._numbers[shape] = len(self._shapes)
            self._shapes.append(shape)
        return number

    def _keep(self, uid: str, guest: Guest) -> None:
        self._records[uid] = _RECORD.pack(*guest)
        if self._file is not None:
            self._append(self._file, self._line(uid, guest))

    def _line(self, uid: str, guest: Guest) -> list[object]:
        shape = self.shape(guest)
        fields = [getattr(shape, name) for name in Shape.__slots__]
        return [
            uid,
            guest.state,
            guest.reason,
            guest.start_ns,
            guest.runtime_id,
            guest.memory_bytes,
            guest.vcpu_count,
            fields,
        ]

    @staticmethod
    def _append(file: BinaryIO, line: list[object] | list[str]) -> None:
        # One write per line: the page cache outlives the process, and a torn line is the last one.
        file.write(json.dumps(line).encode() + os.linesep.encode())

    def _read(self, line: bytes) -> None:
        try:
            uid, *rest = json.loads(line)
        except ValueError:
            return
        if not rest:
            self._records.pop(uid, None)
            return
        state, reason, start_ns, runtime_id, memory_bytes, vcpu_count, fields = rest
        disks, interfaces, *behaviour = fields
        shape = Shape(tuple(disks), tuple(interfaces), *behaviour)
        runtime = uuid.UUID(runtime_id).bytes
        self._records[uid] = _RECORD.pack(
            state, reason, start_ns, runtime, memory_bytes, vcpu_count, self._number(shape)
        )
