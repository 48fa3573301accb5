"""What the compute service keeps beside the domains: private records, written in the transaction of the domain.

* `active` (uid → name): the domains with a guest, so that a start need not read all of them.
* `autostart` (uid → name): the domains that are to start after a boot.
* `mac` (MAC → uid:device): who has a MAC.
* `start` (uid → a start): starts that have begun and not ended.
* `create` (name → a creation): creations that have begun and not ended.
* `delete` (uid → `volumes` or nothing): deletions that have begun and not ended, and whether volumes go with them.
* `volumes` (uid → names): the volumes that were made with a domain.
* `leftover` (volume → of whom): volumes of undone creations and of deletions that were cut: storage is yet to delete
  them, if they are what these domains have had made.
* `occupied` (uid → operation): the domains whose status shows an operation.
* `service` (key → value): the boot id of the last autostart, the inventories that were taken over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from virtfleet.compute.v1 import domain_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute import specs, statuses
from virtfleet_compute.context import KIND
from virtfleet_service.errors import IdentityInUse
from virtfleet_service.store import Transaction

ACTIVE = "active"
AUTOSTART = "autostart"
MAC = "mac"
START = "start"
CREATE = "create"
DELETE = "delete"
VOLUMES = "volumes"
LEFTOVER = "leftover"
OCCUPIED = "occupied"
SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Starting:
    """Is a start that has begun."""

    name: str
    runtime_id: str

    def encode(self) -> bytes:
        """Return it as it is stored."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, body: bytes) -> Starting:
        """Read it."""
        return cls(**json.loads(body))


@dataclass(frozen=True, slots=True)
class Making:
    """Is a volume that is made with a domain.

    Attributes:
        name: Its name.
        uid: Its uid; empty: it is any volume of that name that says that it was made with the domain.
        domain_uid: The domain.
    """

    name: str
    uid: str
    domain_uid: str

    def encode(self) -> str:
        """Return it as a leftover is stored, beside its name."""
        return f"{self.domain_uid}/{self.uid}" if self.uid else self.domain_uid

    @classmethod
    def decode(cls, name: str, text: str) -> Making:
        """Read a leftover."""
        domain_uid, _, uid = text.partition("/")
        return cls(name, uid, domain_uid)


@dataclass(frozen=True, slots=True)
class Creating:
    """Is a creation that has begun, with all that it may have made."""

    name: str
    uid: str
    driver: str
    macs: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    volume_uids: list[str] = field(default_factory=list)
    """The uids that storage is asked to give the volumes: what else has such a name is not of this creation."""

    @property
    def makings(self) -> list[Making]:
        """What storage is asked to make."""
        return [Making(*one, self.uid) for one in zip(self.volumes, self.volume_uids, strict=True)]

    def encode(self) -> bytes:
        """Return it as it is stored."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, body: bytes) -> Creating:
        """Read it."""
        fields = json.loads(body)
        # One that an older service has left says nothing of uids.
        fields.setdefault("volume_uids", [""] * len(fields["volumes"]))
        return cls(**fields)


def save(tx: Transaction, domain: domain_pb2.Domain, cause: str, *, old_state: int | None = None) -> None:
    """Store a domain with its indexes, and tell a change of state.

    Args:
        tx: The transaction.
        domain: The domain.
        cause: The full name of the method, or `observed`.
        old_state: Its state before; None: no event is told.
    """
    if cause != statuses.OBSERVED:
        # The record of a method is the end of its operation.
        statuses.free(domain)
    tx.put(KIND, domain, cause=cause)
    if statuses.is_active(domain):
        tx.put_record(ACTIVE, domain.uid, domain.name.encode())
    else:
        tx.delete_record(ACTIVE, domain.uid)
    if _starts_itself(domain):
        tx.put_record(AUTOSTART, domain.uid, domain.name.encode())
    else:
        tx.delete_record(AUTOSTART, domain.uid)
    if old_state is not None and old_state != domain.status.state:
        tx.event(statuses.state_event(domain, old_state))


def save_new(tx: Transaction, domains: Sequence[domain_pb2.Domain], cause: str) -> None:
    """Store domains whose names and uids nobody has, with their indexes; no change of state is told."""
    tx.put_new(KIND, domains, cause=cause)
    tx.put_records(ACTIVE, [(one.uid, one.name.encode()) for one in domains if statuses.is_active(one)])
    tx.put_records(AUTOSTART, [(one.uid, one.name.encode()) for one in domains if _starts_itself(one)])


def _starts_itself(domain: domain_pb2.Domain) -> bool:
    return domain.spec.autostart in (resource_pb2.AUTOSTART_ALWAYS, resource_pb2.AUTOSTART_ONCE)


def remove(tx: Transaction, domain: domain_pb2.Domain, cause: str, *, old_state: int | None = None) -> None:
    """Delete a domain with all that is kept of it."""
    if old_state is not None and old_state != domain.status.state:
        tx.event(statuses.state_event(domain, old_state))
    tx.delete(domain.name, cause=cause)
    for space in (ACTIVE, AUTOSTART, START, DELETE, VOLUMES, OCCUPIED):
        tx.delete_record(space, domain.uid)
    for card in domain.status.resolved_spec.interfaces.values():
        free_mac(tx, card.mac_address, domain.uid)


def begin_deletion(tx: Transaction, uid: str, *, volumes: bool) -> None:
    """Write down that a domain is about to be taken down, so that a crash does not forget what goes with it."""
    tx.put_record(DELETE, uid, b"volumes" if volumes else b"")


def end_deletions(tx: Transaction, domain_names: Iterable[str]) -> None:
    """Forget the deletions of domains that are still there."""
    for name in domain_names:
        row = tx.get(name)
        if row is not None:
            tx.delete_record(DELETE, row.uid)


def end(tx: Transaction, domain: domain_pb2.Domain, cause: str, *, old_state: int) -> None:
    """Store a domain whose guest has ended; a transient one vanishes."""
    if statuses.transient(domain) and not statuses.is_active(domain):
        remove(tx, domain, cause, old_state=old_state)
    else:
        save(tx, domain, cause, old_state=old_state)


def take_macs(tx: Transaction, domain: domain_pb2.Domain) -> None:
    """Take the MACs of a domain's resolved spec, and give up those that it no longer has.

    Raises:
        IdentityInUse: Another domain has one.
    """
    for mac, device_id in specs.macs(domain.status.resolved_spec):
        holder = tx.get_record(MAC, mac)
        owner = f"{domain.uid}:{device_id}"
        if holder is not None and not holder.decode().startswith(f"{domain.uid}:"):
            other = tx.get_by_uid(KIND, holder.decode().partition(":")[0])
            name = other.name if other is not None else holder.decode()
            raise IdentityInUse(
                f"the MAC {mac} of {device_id} is taken by {name}",
                field=f"domain.spec.interfaces.{device_id}.mac_address",
                mac_address=mac,
                holder=name,
            )
        tx.put_record(MAC, mac, owner.encode())


def macs_of(tx: Transaction, uid: str) -> list[str]:
    """Return the MACs that are taken for a domain; reads those of all domains."""
    return [mac for mac, owner in tx.list_records(MAC) if owner.decode().startswith(f"{uid}:")]


def free_macs_beside(tx: Transaction, domain: domain_pb2.Domain, macs: Iterable[str]) -> None:
    """Give up those of some MACs that neither the definition of a domain nor its running guest has."""
    kept = {mac for mac, _ in specs.macs(domain.status.resolved_spec)}
    if statuses.is_active(domain):
        kept |= {mac for mac, _ in specs.macs(domain.status.active_spec)}
    free_macs(tx, sorted(set(macs) - kept), domain.uid)


def free_macs(tx: Transaction, macs: Iterable[str], uid: str) -> None:
    """Give MACs up."""
    for mac in macs:
        free_mac(tx, mac, uid)


def free_mac(tx: Transaction, mac: str, uid: str) -> None:
    """Give a MAC up if the domain has it."""
    holder = tx.get_record(MAC, mac)
    if holder is not None and holder.decode().startswith(f"{uid}:"):
        tx.delete_record(MAC, mac)


def keep_leftover(tx: Transaction, making: Making) -> None:
    """Note that a volume is to be deleted if it is this one; several domains may have asked for one of its name."""
    kept = (tx.get_record(LEFTOVER, making.name) or b"").decode().split()
    tx.put_record(LEFTOVER, making.name, "\n".join(dict.fromkeys([*kept, making.encode()])).encode())


def drop_leftover(tx: Transaction, making: Making) -> None:
    """Note that nothing is left of a volume."""
    kept = [one for one in (tx.get_record(LEFTOVER, making.name) or b"").decode().split() if one != making.encode()]
    if kept:
        tx.put_record(LEFTOVER, making.name, "\n".join(kept).encode())
    else:
        tx.delete_record(LEFTOVER, making.name)


def leftovers(records: Iterable[tuple[str, bytes]]) -> list[Making]:
    """Return the volumes that storage is yet to delete."""
    return [Making.decode(name, one) for name, body in records for one in body.decode().split()]
