"""Seeds of the test driver: domains that exist from the first start on.

A TOML or JSON file with one table per group of domains:

    [[domains]]
    id = "web-{number:05d}"
    count = 1000
    running = true
    labels = { tier = "web" }
    [domains.spec]
    memory = { maximumBytes = "1073741824" }

`spec` is a DomainSpec in protobuf's JSON form. The uid of a domain follows from its id and `uid_space`, so that a seed
is the same in every process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainObservation, DomainState, DomainStateReason
from virtfleet_compute.drivers.facets import FoundDomain
from virtfleet_compute.drivers.test.settings import from_table
from virtfleet_service import files
from virtfleet_service.errors import DriverBroken

SEED_LIMIT_BYTES = 16 << 20
"""What a seed file may have: a group of domains has some hundred bytes, however many it makes."""
BATCH_COUNT = 1000


def _groups(value: object, where: str) -> tuple[Group, ...]:
    if not isinstance(value, list):
        raise DriverBroken(f"{where} must be a list of tables", driver="test", cause=where)
    return tuple(from_table(Group, item, f"{where}[{number}]") for number, item in enumerate(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Is a number of equal domains."""

    id: str
    """Their ids; `{number}` stands for 0, 1, 2, …"""
    count: int = 1
    running: bool = False
    display_name: str = ""
    labels: dict[str, str] = field(default_factory=dict, metadata={"of": lambda value, _: dict(value)})
    spec: dict[str, Any] = field(default_factory=dict, metadata={"of": lambda value, _: dict(value)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Is a whole seed file."""

    uid_space: str = "virtfleet-test"
    """Makes the uids; nodes of one fleet need different ones."""
    domains: tuple[Group, ...] = field(default=(), metadata={"of": _groups})


@functools.lru_cache(maxsize=1)
def _parsed(text: bytes, suffix: str) -> tuple[Seed, tuple[domain_spec_pb2.DomainSpec, ...]]:
    """Read a seed: once for all nodes of a process that begin with the same."""
    raw = json.loads(text) if suffix == ".json" else tomllib.loads(text.decode())
    seed = from_table(Seed, raw, "the seed file")
    return seed, tuple(json_format.ParseDict(group.spec, domain_spec_pb2.DomainSpec()) for group in seed.domains)


def uuid5_text(space: bytes, name: str) -> str:
    """Return what `str(uuid.uuid5(…))` does, in a small part of the time: a fleet needs tens of thousands."""
    text = hashlib.sha1(space + name.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant}{text[17:20]}-{text[20:32]}"


def _unusable(path: Path, cause: object) -> DriverBroken:
    return DriverBroken(f"the seed file {path} cannot be used: {cause}", path=path, cause=cause)


class Seeds:
    """Reads a seed file.

    Raises:
        DriverBroken: The file cannot be read or is wrong.
    """

    def __init__(self, path: Path, node: str) -> None:
        try:
            text = files.read(path, SEED_LIMIT_BYTES)
            self.seed, self._specs = _parsed(text, path.suffix)
        except RecursionError as error:
            raise _unusable(path, "it is nested too deep") from error
        except OSError as error:
            raise _unusable(path, error.strerror or error) from error
        except (ValueError, json_format.ParseError) as error:
            raise _unusable(path, error) from error
        self.digest = hashlib.sha256(text).hexdigest()
        self._space = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.seed.uid_space}/{node}").bytes

    def found(self) -> Iterator[FoundDomain]:
        """Yield the domains; those that run have a run of their own."""
        now_ns = time.time_ns()
        run = DomainObservation(
            uid="",
            state=DomainState.DOMAIN_STATE_RUNNING,
            reason=DomainStateReason.DOMAIN_STATE_REASON_BOOTED,
            start_time=datetime.fromtimestamp(now_ns / 1e9, UTC),
        )
        for group, spec in zip(self.seed.domains, self._specs, strict=True):
            observation = run if group.running else None
            for number in range(group.count):
                domain_id = group.id.format(number=number)
                uid = uuid5_text(self._space, domain_id)
                runtime_id = uuid5_text(self._space, f"{domain_id}/{now_ns}") if group.running else ""
                yield FoundDomain(domain_id, uid, spec, observation, runtime_id, group.display_name, group.labels)
