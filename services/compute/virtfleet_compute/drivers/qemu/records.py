"""What the driver writes down about runs, beside what the launcher does, so that its next instance knows it.

* With the process, in the launcher's run directory (`spec` of the spawn): what was started. It is there from before the
  first instruction, and goes with the process.
* In the driver's own run directory: why the run is about to end (QEMU knows, its exit code does not tell), and what
  runs after live changes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet_service.errors import BackendFailed

_log = logging.getLogger(__name__)

_SPEC_FILE = "spec"


@dataclass(frozen=True, slots=True)
class Birth:
    """Is what a run was started with."""

    name: str
    start_time: datetime
    spec: domain_spec_pb2.DomainSpec
    images: Mapping[str, str] = field(default_factory=dict)
    """The path of each disk's image, by device id."""
    capacities: Mapping[str, int] = field(default_factory=dict)
    """What the guest sees of each disk, by device id; 0: unknown."""
    taps: Mapping[str, str] = field(default_factory=dict)
    """The tap of each network card, by device id."""

    def encode(self) -> bytes:
        """Return it as bytes for the launcher to keep."""
        return json.dumps(
            {
                "name": self.name,
                "start_time": self.start_time.timestamp(),
                "spec": base64.b64encode(self.spec.SerializeToString()).decode(),
                "images": dict(self.images),
                "capacities": dict(self.capacities),
                "taps": dict(self.taps),
            }
        ).encode()


def read_birth(run_directory: Path) -> Birth | None:
    """Return what the launcher keeps in a process's run directory; None: it is not there, or is not ours."""
    try:
        value: dict[str, Any] = json.loads((run_directory / _SPEC_FILE).read_bytes())
        return Birth(
            name=value["name"],
            start_time=datetime.fromtimestamp(value["start_time"], UTC),
            spec=domain_spec_pb2.DomainSpec.FromString(base64.b64decode(value["spec"])),
            images=value["images"],
            capacities=value["capacities"],
            taps=value["taps"],
        )
    except (OSError, ValueError, KeyError, TypeError, binascii.Error, DecodeError):
        # Written by somebody else, or a version that kept other things; what runs can be held without it.
        return None


@dataclass(frozen=True, slots=True)
class End:
    """Says how a run ends, written before it does."""

    state: domain_pb2.DomainState.ValueType
    reason: domain_pb2.DomainStateReason.ValueType


class Records:
    """Holds the driver's own records: a directory per domain, small files that are there as a whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put_end(self, uid: str, runtime_id: str, end: End) -> None:
        """Write down how a run is about to end. Never raises: a guest must end on a full disk as well."""
        value = {"runtime_id": runtime_id, "state": int(end.state), "reason": int(end.reason)}
        try:
            self._write(uid, "end", json.dumps(value).encode())
        except OSError as error:
            _log.warning("if this service dies now, the next one will not know why %s ended: %s", uid, error)

    def end(self, uid: str, runtime_id: str) -> End | None:
        """Return how a run was about to end; None: nobody knew."""
        value = self._read(uid, "end", runtime_id)
        if value is None:
            return None
        state, reason = value.get("state"), value.get("reason")
        if state not in domain_pb2.DomainState.values() or reason not in domain_pb2.DomainStateReason.values():
            return None
        return End(domain_pb2.DomainState.ValueType(state), domain_pb2.DomainStateReason.ValueType(reason))

    def drop_end(self, uid: str) -> None:
        """Take back what `put_end` wrote down."""
        (self._directory / uid / "end").unlink(missing_ok=True)

    def put_active(self, uid: str, runtime_id: str, spec: domain_spec_pb2.DomainSpec) -> None:
        """Write down what runs after a live change.

        Raises:
            BackendFailed: The disk is full; what was written down before stands.
        """
        text = base64.b64encode(spec.SerializeToString()).decode()
        try:
            self._write(uid, "active", json.dumps({"runtime_id": runtime_id, "spec": text}).encode())
        except OSError as error:
            raise BackendFailed(
                f"what runs cannot be written down: {error.strerror}", path=self._directory / uid, cause=error
            ) from error

    def active(self, uid: str, runtime_id: str) -> domain_spec_pb2.DomainSpec | None:
        """Return what runs after live changes; None: there were none."""
        value = self._read(uid, "active", runtime_id)
        try:
            return None if value is None else domain_spec_pb2.DomainSpec.FromString(base64.b64decode(value["spec"]))
        except (KeyError, TypeError, ValueError, DecodeError) as error:
            _log.warning("the record of what runs of %s cannot be read: %s", uid, error)
            return None

    def clear(self, uid: str) -> None:
        """Remove the records of a domain's runs; its folder stays, because to remove one takes milliseconds."""
        folder = self._directory / uid
        if folder.is_dir():
            for path in folder.iterdir():
                path.unlink(missing_ok=True)

    def forget(self, uid: str) -> None:
        """Remove all that there is of a domain."""
        self.clear(uid)
        with contextlib.suppress(FileNotFoundError):
            (self._directory / uid).rmdir()

    def _write(self, uid: str, name: str, data: bytes) -> None:
        folder = self._directory / uid
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = folder / f"{name}.{os.getpid()}"
        try:
            fresh.write_bytes(data)
            fresh.replace(folder / name)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise

    def _read(self, uid: str, name: str, runtime_id: str) -> dict[str, Any] | None:
        try:
            value = json.loads((self._directory / uid / name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            # It says something about a run that is found without it as well.
            _log.warning("the record %s of %s cannot be read: %s", name, uid, error)
            return None
        if not isinstance(value, dict) or value.get("runtime_id") != runtime_id:
            return None
        return value
