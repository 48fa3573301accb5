"""A caller in a process of its own: changes resources without pause and writes down, with fsync, what it was told.

    python -m tests.chaos.writer RECORD TAG SEED     # the fleet from the environment; ends with its standard input

One line of JSON before each call (`intent`) and one behind it (`ack`, `failed`). What fails in a way that the API calls
retryable is sent again with the same request_id; what has failed for good is tried again as a new change, as a
controller would. Each thread leads resources of one kind through their lives: `LIVES`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, TextIO

import grpc
from google.protobuf import empty_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_client import Fleet, VirtfleetError, connect
from virtfleet_client.errors import ResourceExists, ResourceNotFound
from virtfleet_client.operations import result_of

NODE: Final = "nodes/n1"
PLACE: Final = "chaos"
"""The pool and the network that the rounds have made."""
KEPT_EVERY: Final = 3
"""Of so many resources one stays, running."""
PATIENCE_SECONDS: Final = 60.0
TRIES: Final = 8
_MIB: Final = 1 << 20
_SUBNETS: Final = 70
"""How many networks one round may make; their subnets must not meet."""


class Gone(Exception):
    """A change failed as often as it was tried."""


class Record:
    """Is the file of what was said; every line is on the disk before anything else happens."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        """Append a line."""
        with self._lock:
            self._file.write(json.dumps({"time": time.time(), **fields}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


class Caller:
    """Leads resources of one kind through their lives, one after the other.

    Args:
        fleet: The gateway.
        record: Takes what was said.
        prefix: Stands in the ids.
        stop: Set when no new life shall begin.
        chance: Decides what is done.
    """

    def __init__(self, fleet: Fleet, record: Record, prefix: str, stop: threading.Event, chance: random.Random) -> None:
        self._fleet = fleet
        self._record = record
        self._prefix = prefix
        self._stop = stop
        self._chance = chance

    def run(self) -> None:
        """Go on until told to stop."""
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                self._life(number, f"{self._prefix}-{number}", keep=number % KEPT_EVERY == 0)
            except Gone:
                continue

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        raise NotImplementedError

    def _change(self, what: str, name: str, method: Callable[..., Any], request: Any, kind: Any) -> None:
        for _ in range(TRIES):
            request.request_id = str(uuid.uuid4())
            said = {"what": what, "name": name, "request_id": request.request_id}
            self._record.write(say="intent", **said)
            try:
                answer = self._answered(method, request, kind)
            except TimeoutError as error:
                self._record.write(say="failed", **said, code="TIMEOUT", reason="", message=str(error))
                raise Gone from error
            except VirtfleetError as error:
                self._record.write(
                    say="failed", **said, code=error.code().name, reason=error.reason, message=error.details()
                )
                if isinstance(error, ResourceNotFound) or (what == "create" and isinstance(error, ResourceExists)):
                    # A creation that failed after its effect was acknowledged to nobody; what is there is not ours to
                    # judge.
                    raise Gone from error
                time.sleep(0.1)
            else:
                uid, generation = getattr(answer, "uid", ""), getattr(answer, "generation", 0)
                capacity = answer.status.capacity_bytes if kind is volume_pb2.Volume else 0
                self._record.write(say="ack", **said, uid=uid, generation=generation, capacity=capacity)
                return
        raise Gone

    def _answered(self, method: Callable[..., Any], request: Any, kind: Any) -> Any:
        """Return the result; a lost answer is asked for again, a failed operation is not: its request_id is used up."""
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                operation = self._fleet.finish(method(request, timeout=10), timeout_seconds=PATIENCE_SECONDS)
                break
            except VirtfleetError as error:
                lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if not lost or time.monotonic() > ends_at:
                    raise
                time.sleep(0.1)
        return result_of(operation, kind)


def _labelled(name: str, step: int) -> domain_pb2.UpdateDomainRequest:
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, labels={"n": str(step)}))
    update.update_mask.paths.append("labels")
    return update


class Guests(Caller):
    """Makes real QEMU guests with a disk and a port on a NAT network."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        name, domains = f"{NODE}/domains/{resource_id}", self._fleet.domains
        self._change("create", name, domains.CreateDomain, self._creation(resource_id), domain_pb2.Domain)
        start = domain_pb2.StartDomainRequest(name=name, paused=True)
        self._change("start", name, domains.StartDomain, start, domain_pb2.Domain)
        for step in range(self._chance.randint(1, 3)):
            self._change("update", name, domains.UpdateDomain, _labelled(name, step), domain_pb2.Domain)
        if keep:
            return
        stop = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
        self._change("stop", name, domains.StopDomain, stop, domain_pb2.Domain)
        delete = domain_pb2.DeleteDomainRequest(name=name, delete_volumes=True)
        self._change("delete", name, domains.DeleteDomain, delete, empty_pb2.Empty)

    def _creation(self, domain_id: str) -> domain_pb2.CreateDomainRequest:
        create = domain_pb2.CreateDomainRequest(parent=NODE, domain_id=domain_id)
        spec = create.domain.spec
        spec.driver, spec.memory.maximum_bytes, spec.cpu.vcpu_count = "qemu", 64 * _MIB, 1
        disk = create.new_volumes.add(pool=f"pools/{PLACE}", volume_id=domain_id)
        disk.spec.format, disk.spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_QCOW2, 8 * _MIB
        spec.disks["root"].volume = f"pools/{PLACE}/volumes/{domain_id}"
        spec.interfaces["lan"].network = f"networks/{PLACE}"
        return create


class Bulk(Caller):
    """Makes domains of the driver without processes: many changes, quickly. Its runs would end with the service."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        name, domains = f"{NODE}/domains/{resource_id}", self._fleet.domains
        create = domain_pb2.CreateDomainRequest(parent=NODE, domain_id=resource_id)
        spec = create.domain.spec
        spec.driver, spec.memory.maximum_bytes, spec.cpu.vcpu_count = "test", 64 * _MIB, 1
        self._change("create", name, domains.CreateDomain, create, domain_pb2.Domain)
        for step in range(self._chance.randint(1, 3)):
            self._change("update", name, domains.UpdateDomain, _labelled(name, step), domain_pb2.Domain)
        if not keep:
            delete = domain_pb2.DeleteDomainRequest(name=name)
            self._change("delete", name, domains.DeleteDomain, delete, empty_pb2.Empty)


class Volumes(Caller):
    """Makes volumes that no domain uses, and lets them grow."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        parent, volumes = f"{NODE}/pools/{PLACE}", self._fleet.volumes
        name, capacity = f"{parent}/volumes/{resource_id}", 4 * _MIB
        create = volume_pb2.CreateVolumeRequest(parent=parent, volume_id=resource_id)
        create.volume.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
        create.volume.spec.capacity_bytes = capacity
        self._change("create", name, volumes.CreateVolume, create, volume_pb2.Volume)
        for _ in range(self._chance.randint(1, 3)):
            capacity += _MIB
            resize = volume_pb2.ResizeVolumeRequest(name=name, capacity_bytes=capacity)
            self._change("update", name, volumes.ResizeVolume, resize, volume_pb2.Volume)
        if not keep:
            delete = volume_pb2.DeleteVolumeRequest(name=name)
            self._change("delete", name, volumes.DeleteVolume, delete, empty_pb2.Empty)


class Networks(Caller):
    """Makes isolated networks with a bridge, rules and a dnsmasq each."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        name, networks = f"{NODE}/networks/{resource_id}", self._fleet.networks
        create = network_pb2.CreateNetworkRequest(parent=NODE, network_id=resource_id)
        create.network.spec.isolated.SetInParent()
        prefix = f"192.168.{180 + number % _SUBNETS}"
        lan = create.network.spec.subnets["lan"]
        lan.prefix = f"{prefix}.0/24"
        lan.dhcp.ranges.add(first=f"{prefix}.10", last=f"{prefix}.250")
        self._change("create", name, networks.CreateNetwork, create, network_pb2.Network)
        start = network_pb2.StartNetworkRequest(name=name)
        self._change("start", name, networks.StartNetwork, start, network_pb2.Network)
        update = network_pb2.UpdateNetworkRequest(network=network_pb2.Network(name=name, labels={"n": "1"}))
        update.update_mask.paths.append("labels")
        self._change("update", name, networks.UpdateNetwork, update, network_pb2.Network)
        if keep:
            return
        stop = network_pb2.StopNetworkRequest(name=name)
        self._change("stop", name, networks.StopNetwork, stop, network_pb2.Network)
        delete = network_pb2.DeleteNetworkRequest(name=name)
        self._change("delete", name, networks.DeleteNetwork, delete, empty_pb2.Empty)


LIVES: Final = (Guests, Guests, Guests, Bulk, Volumes, Networks)


def main() -> None:
    """Run until standard input ends, then finish what was begun."""
    path, tag, seed = sys.argv[1:]
    stop = threading.Event()
    with open(path, "a", encoding="utf-8") as file, connect() as fleet:  # noqa: PTH123 - appended to
        record = Record(file)
        callers = [
            life(fleet, record, f"{tag}-{number}", stop, random.Random(f"{seed}/{number}"))
            for number, life in enumerate(LIVES)
        ]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()
        record.write(say="end")


if __name__ == "__main__":
    main()
