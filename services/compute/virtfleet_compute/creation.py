"""Makes domains: what is decided at once, what is made for them (volumes, ports), and how all of it is undone."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_compute import records, specs, statuses, wiring
from virtfleet_compute.context import KIND, Context, ref
from virtfleet_compute.drivers.api import DomainRef
from virtfleet_compute.guests import Guests
from virtfleet_service import authorization, failpoints, names, resources
from virtfleet_service.errors import (
    IdentityInUse,
    NotCancellable,
    OperationConflict,
    ResourceExists,
    ResourceNotFound,
    UidMismatch,
    VirtfleetError,
)
from virtfleet_service.peers import error_from_status
from virtfleet_service.store import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)

OWNER_LABEL = "virtfleet.dev/domain-uid"
"""The label of a volume that was made with a domain: the uid of that domain."""

VOLUME_WAIT_SECONDS = 20

_OPERATIONS = "google.longrunning.Operations"


@dataclass(slots=True)
class Draft:
    """Is a domain that has been decided on and not made yet."""

    request: domain_pb2.CreateDomainRequest
    domain: domain_pb2.Domain
    creating: records.Creating

    @property
    def simple(self) -> bool:
        """Whether making it is a matter of records and the driver's `define` alone."""
        return not (self.creating.volumes or self.creating.ports or self.starts)

    @property
    def starts(self) -> bool:
        """Whether it is started: asked for, or transient."""
        return self.request.HasField("start") or statuses.transient(self.domain)


class Creation:
    """Makes domains for CreateDomain, its batch, and UpdateDomain with `allow_missing`."""

    def __init__(self, context: Context, guests: Guests) -> None:
        self._context = context
        self._guests = guests

    # What is decided.

    async def draft(self, request: domain_pb2.CreateDomainRequest, call: Call | None) -> Draft:
        """Decide on everything, without any effect.

        Raises:
            NameMalformed: The id has the form of a UUID.
            FieldRequired, FieldConflict, FieldOutOfRange, ReferenceOtherNode: The spec is wrong.
            PermissionMissing: It names host paths, or switches isolation off, and the caller may not.
            CapabilityMissing: The driver lacks something that it asks for.
            DriverBroken: The driver cannot run.
        """
        node = self._context.node
        names.check_id(request.domain_id, "domain_id")
        name = f"nodes/{node}/domains/{request.domain_id}"
        domain = domain_pb2.Domain(display_name=request.domain.display_name)
        domain.labels.MergeFrom(request.domain.labels)
        domain.annotations.MergeFrom(request.domain.annotations)
        domain.spec.CopyFrom(request.domain.spec)
        resources.create_head(domain, name, call=call, uid=resources.uid_for(request.domain))
        authorize_spec(domain.name, domain.spec, domain_spec_pb2.DomainSpec(), call)
        resolved = await self.resolve(domain, None)
        statuses.defined(domain, resolved)
        macs = [mac for mac, _ in specs.macs(resolved)]
        volumes = [
            f"{names.absolute(new.pool, node, field=f'new_volumes[{number}].pool')}/volumes/{new.volume_id}"
            for number, new in enumerate(request.new_volumes)
        ]
        ports = [
            f"{names.absolute(resolved.interfaces[key].network, node)}/ports/{specs.port_id(request.domain_id, key)}"
            for key in wiring.owned_ports(resolved)
        ]
        uids = [str(uuid.uuid4()) for _ in volumes]
        creating = records.Creating(name, domain.uid, resolved.driver, macs, volumes, ports, uids)
        return Draft(request, domain, creating)

    async def resolve(
        self, domain: domain_pb2.Domain, previous: domain_spec_pb2.DomainSpec | None
    ) -> domain_spec_pb2.DomainSpec:
        """Normalise a domain's spec in place and return what it comes to.

        Raises:
            VirtfleetError: See `draft`.
        """
        specs.normalize(domain.spec, self._context.node)
        specs.check(domain.spec)
        full = specs.with_defaults(domain.spec, self._context.hypervisors.default_id, previous, self._free_mac)
        specs.check(full)
        await self._context.hypervisors.look_again(full.driver)
        driver = self._context.hypervisors.get(full.driver)
        return await driver.resolve(ref(domain), full, previous)

    def _free_mac(self) -> str:
        """Return a new MAC that no domain has."""
        while self._context.store.get_record(records.MAC, mac := specs.new_mac()) is not None:
            pass
        return mac

    # What is recorded.

    def accept(self, tx: Transaction, draft: Draft, *, lasting: bool = True) -> str:
        """Check that there is room for a domain and take its MACs; in the transaction that accepts the creation.

        Args:
            tx: The transaction.
            draft: The domain.
            lasting: Whether the domain is stored in a later transaction, and its name must be kept until then.

        Raises:
            OperationConflict: It is being made.
            ResourceExists: The id is taken.
            IdentityInUse: The uid or a MAC is taken.
            QuotaExceeded: There are as many domains as may be.
        """
        domain = draft.domain
        if tx.get(domain.name) is not None:
            raise ResourceExists(f"{domain.name} exists", resource=domain.name, name=domain.name)
        if tx.get_record(records.CREATE, domain.name) is not None:
            raise OperationConflict(f"{domain.name} is being made", resource=domain.name, retry_delay_seconds=1.0)
        for making, body in tx.list_records(records.CREATE):
            if records.Creating.decode(body).uid == domain.uid:
                raise OperationConflict(
                    f"{making} is being made with the uid {domain.uid}", resource=making, retry_delay_seconds=1.0
                )
        other = tx.get_by_uid(KIND, domain.uid)
        if other is not None:
            raise IdentityInUse(
                f"the uid {domain.uid} is that of {other.name}", field="domain.uid", uid=domain.uid, holder=other.name
            )
        if self._context.settings.domain_limit:
            count = tx.connection.execute("SELECT count(*) FROM resources WHERE kind = ?", (KIND,)).fetchone()[0]
            self._context.admission.check_definitions(count, 1)
        records.take_macs(tx, domain)
        if lasting:
            tx.put_record(records.CREATE, domain.name, draft.creating.encode())
        return domain.uid

    def record(self, tx: Transaction, draft: Draft, run: statuses.Run | None, cause: str) -> domain_pb2.Domain:
        """Store a domain that has been made."""
        domain = draft.domain
        old_state = domain.status.state
        if run is not None:
            statuses.started(domain, run)
        tx.delete_record(records.CREATE, domain.name)
        if draft.creating.volumes:
            tx.put_record(records.VOLUMES, domain.uid, "\n".join(draft.creating.volumes).encode())
        records.save(tx, domain, cause, old_state=old_state)
        return domain

    @staticmethod
    def forget(tx: Transaction, creating: records.Creating) -> None:
        """Forget a creation that has been undone. Nothing happens if it was not accepted: its name may be another's."""
        body = tx.get_record(records.CREATE, creating.name)
        if body is not None and records.Creating.decode(body) == creating:
            tx.delete_record(records.CREATE, creating.name)
            records.free_macs(tx, creating.macs, creating.uid)

    # What is made.

    async def make(
        self, draft: Draft, call: Call | None, undo: AsyncExitStack, phase: Callable[[str], None], request_key: str
    ) -> statuses.Run | None:
        """Make volumes, ports and definition of a domain that the caller holds, and start it if asked to.

        Args:
            draft: The domain.
            call: On whose behalf.
            undo: Gets the way back.
            phase: Is told what is being done.
            request_key: Makes the request ids of what storage is asked for.

        Raises:
            VirtfleetError: What storage, network or the driver answered.
        """
        domain = draft.domain
        driver = self._context.driver(domain)
        for number, (making, new) in enumerate(zip(draft.creating.makings, draft.request.new_volumes, strict=True)):
            phase(f"making volume {new.volume_id}")
            request = self._volume_request(making, new, f"{request_key}/{number}")
            undo.push_async_callback(self._remove_volume, making)
            await self._make_volume(request, call, partial(_place_of_volume, number))
            failpoints.reach("compute.create.volume")
        if draft.creating.ports:
            phase("reserving ports")
            statuses.reserved(domain, await self._guests.ensure_ports(domain, domain.status.resolved_spec, call, undo))
            failpoints.reach("compute.create.ports")
        undo.push_async_callback(driver.undefine, ref(domain))
        await driver.define(ref(domain), domain.status.resolved_spec)
        if not draft.starts:
            return None
        return await self._guests.start(
            domain,
            call,
            undo,
            runtime_id=str(uuid.uuid4()),
            paused=draft.request.start.paused,
            phase=phase,
        )

    @staticmethod
    def _volume_request(
        making: records.Making, new: domain_pb2.NewVolume, request_id: str
    ) -> volume_pb2.CreateVolumeRequest:
        volume = volume_pb2.Volume(
            uid=making.uid,
            labels={OWNER_LABEL: making.domain_uid},
            spec=new.spec if new.HasField("spec") else None,
        )
        return volume_pb2.CreateVolumeRequest(
            parent=names.parent_of(making.name),
            volume=volume,
            volume_id=new.volume_id,
            source_volume=new.source_volume,
            request_id=request_id,
        )

    async def _make_volume(
        self, request: volume_pb2.CreateVolumeRequest, call: Call | None, place: Callable[[str], str]
    ) -> None:
        """Ask storage for a volume and wait until it is there. Cancelled, it cancels what storage does for it."""
        # Whatever happens here, its answer is waited for: only it says what there is to cancel.
        accepted = asyncio.create_task(
            self._ask_for_volume(request, 0, call, place), name=f"ask for {request.volume_id}"
        )
        try:
            operation = await asyncio.shield(accepted)
            while not operation.done:
                operation = await self._ask_for_volume(request, VOLUME_WAIT_SECONDS, call, place)
        except asyncio.CancelledError:
            await self._cancel_volume(accepted)
            raise
        if operation.HasField("error"):
            raise error_from_status(operation.error).rebased(place)

    async def _ask_for_volume(
        self, request: volume_pb2.CreateVolumeRequest, seconds: int, call: Call | None, place: Callable[[str], str]
    ) -> operations_pb2.Operation:
        """Ask storage for a volume and wait for a while: a repeated request is the same operation."""
        request.inline_wait.FromSeconds(seconds)
        return await self._context.wiring.storage.call(
            "virtfleet.storage.v1.VolumeService.CreateVolume",
            request,
            operations_pb2.Operation,
            call,
            timeout_seconds=seconds + self._context.settings.peer_seconds,
            place=place,
        )

    async def _cancel_volume(self, accepted: asyncio.Task[operations_pb2.Operation]) -> None:
        """End what storage does for a volume that is no longer wanted. Never raises: the undo sees what came of it."""
        storage, seconds = self._context.wiring.storage, self._context.settings.peer_seconds
        try:
            name = (await accepted).name
            cancel = operations_pb2.CancelOperationRequest(name=name)
            with suppress(NotCancellable):
                # Too late: it is nearly made.
                await storage.call(f"{_OPERATIONS}.CancelOperation", cancel, empty_pb2.Empty, timeout_seconds=seconds)
            wait = operations_pb2.WaitOperationRequest(
                name=name, timeout=duration_pb2.Duration(seconds=VOLUME_WAIT_SECONDS)
            )
            seconds += VOLUME_WAIT_SECONDS
            await storage.call(f"{_OPERATIONS}.WaitOperation", wait, operations_pb2.Operation, timeout_seconds=seconds)
        except VirtfleetError as error:
            _log.warning("storage may still make a volume that is not wanted: %s", error)

    async def _remove_volume(self, making: records.Making) -> None:
        """Delete a volume that a creation has had made. Never raises: what stays, the sweep deletes."""
        try:
            await self.take_back_volume(making)
        except VirtfleetError as error:
            _log.warning("%s stays for now: %s", making.name, error)
            await self._keep_leftover(making)

    async def _keep_leftover(self, making: records.Making) -> None:
        await self._context.store.write(lambda tx: records.keep_leftover(tx, making))
        self._context.wiring.unswept["storage"].set()

    async def _volume(self, name: str) -> volume_pb2.Volume | None:
        try:
            return await self._context.wiring.storage.call(
                "virtfleet.storage.v1.VolumeService.GetVolume",
                volume_pb2.GetVolumeRequest(name=name),
                volume_pb2.Volume,
                timeout_seconds=self._context.settings.peer_seconds,
            )
        except ResourceNotFound:
            return None

    async def take_back_volume(self, making: records.Making) -> None:
        """Delete a volume unless it is another one of its name. Succeeds if there is none and none will be.

        Raises:
            OperationConflict: Storage is still making it.
            VirtfleetError: What storage answered.
        """
        while await self._volume(making.name) is None:
            # Not there yet, or never: storage refuses to delete what it is making, and of this uid there is none.
            with suppress(UidMismatch):
                await self._delete_volume(making.name, str(uuid.uuid4()), None, allow_missing=True)
                return
        await self.delete_volume(making)

    async def delete_volume(self, making: records.Making, call: Call | None = None) -> None:
        """Delete a volume unless it is another one of its name. Succeeds if there is none.

        Raises:
            VirtfleetError: What storage answered.
        """
        volume = await self._volume(making.name)
        if volume is not None and _is(volume, making):
            # Gone meanwhile, or another of its name: there is none of ours.
            with suppress(ResourceNotFound, UidMismatch):
                await self._delete_volume(making.name, volume.uid, call)

    async def _delete_volume(
        self, name: str, volume_uid: str, call: Call | None, *, allow_missing: bool = False
    ) -> None:
        # Of this attempt alone: storage remembers a refusal with the id that it answered.
        request_id = str(uuid.uuid4())
        while True:
            operation = await self._context.wiring.storage.call(
                "virtfleet.storage.v1.VolumeService.DeleteVolume",
                volume_pb2.DeleteVolumeRequest(
                    name=name,
                    expected_uid=volume_uid,
                    allow_missing=allow_missing,
                    request_id=request_id,
                    inline_wait=duration_pb2.Duration(seconds=VOLUME_WAIT_SECONDS),
                ),
                operations_pb2.Operation,
                call,
                timeout_seconds=VOLUME_WAIT_SECONDS + self._context.settings.peer_seconds,
            )
            if operation.done:
                break
        if operation.HasField("error"):
            raise error_from_status(operation.error)

    async def undo_crashed(self, creating: records.Creating) -> None:
        """Undo what a creation may have made before the service died. Never raises for peers that are away."""
        target = DomainRef(creating.name, creating.uid)
        try:
            driver = self._context.hypervisors.get(creating.driver)
            await driver.stop(target)
            await driver.undefine(target)
        except VirtfleetError as error:
            _log.warning("what driver %s has of %s stays: %s", creating.driver, creating.name, error)
        await self._context.wiring.unreserve(target, creating.ports)
        # The sweep deletes the volumes once it has given back what was attached.
        for making in creating.makings:
            await self._keep_leftover(making)


def _is(volume: volume_pb2.Volume, making: records.Making) -> bool:
    """Tell whether a volume is one that was made with a domain.

    A creation goes by the uid alone: a domain that was deleted leaves its volumes, and one of the same uid that asks
    for the same names must not take them with it when it fails.
    """
    if making.uid:
        return volume.uid == making.uid
    return volume.labels.get(OWNER_LABEL) == making.domain_uid


def _place_of_volume(number: int, path: str) -> str:
    """Return where a field of CreateVolumeRequest stands in CreateDomainRequest."""
    new = f"new_volumes[{number}]"
    if path == "parent":
        return f"{new}.pool"
    path = path.removeprefix("volume.")
    return f"{new}.{path}" if path.partition(".")[0] in ("spec", "volume_id", "source_volume") else new


def authorize_spec(
    name: str, spec: domain_spec_pb2.DomainSpec, before: domain_spec_pb2.DomainSpec, call: Call | None
) -> None:
    """Check the permissions that no reference in a spec stands for.

    Raises:
        PermissionMissing: The spec names a new host path, or switches isolation off, and the caller may not.
    """
    if call is None:
        return
    if set(specs.host_paths(spec)) - set(specs.host_paths(before)):
        call.authorize(name, authorization.HOST_PATHS)
    if specs.without_sandbox(spec) and not specs.without_sandbox(before):
        call.authorize(name, authorization.EXTRA_ARGUMENTS)
