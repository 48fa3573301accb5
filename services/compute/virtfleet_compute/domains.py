"""Definitions of domains: reads, creation and deletion."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import lifecycle, records, statuses
from virtfleet_compute.context import KIND, Context, read_checked, ref
from virtfleet_compute.creation import Creation, Draft
from virtfleet_compute.drivers.api import DomainObservation
from virtfleet_compute.guests import Guests
from virtfleet_compute.holds import Hold
from virtfleet_compute.lifecycle import Verb
from virtfleet_service import failpoints, names, paging, requests, resources, views
from virtfleet_service.changes import field_bytes
from virtfleet_service.errors import (
    DeletionProtected,
    ResourceNotFound,
    VirtfleetError,
)
from virtfleet_service.operations import Commit, Intent, Job
from virtfleet_service.store import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call


class Domains:
    """Reads, makes and deletes domains."""

    def __init__(self, context: Context, guests: Guests, creation: Creation) -> None:
        self._context = context
        self._guests = guests
        self._creation = creation

    # Reads.

    def get(self, name: str, view: int, call: Call) -> bytes:
        """Return a serialised domain; FULL is what is stored, byte by byte.

        Raises:
            ResourceNotFound: There is none.
            PermissionMissing: The caller may not see it.
        """
        row = self._context.store.find(KIND, name)
        call.authorize(row.name)
        if view != views.BASIC:
            return row.body
        return views.apply_view(domain_pb2.Domain.FromString(row.body), view).SerializeToString()

    def page(self, request: domain_pb2.ListDomainsRequest, call: Call) -> bytes:
        """Return a serialised page of domains."""
        return paging.list_reply(self._context.store, KIND, request, domain_pb2.ListDomainsResponse, call=call)

    def batch_get(self, request: domain_pb2.BatchGetDomainsRequest, call: Call) -> bytes:
        """Return many domains, each with a status of its own."""
        parts = []
        for name in request.names:
            result = domain_pb2.DomainResult(name=name)
            body = b""
            try:
                body = self.get(name, request.view, call)
            except VirtfleetError as error:
                result.status.CopyFrom(error.to_status())
            encoded = result.SerializeToString()
            if body:
                encoded += field_bytes(2, b"") + field_bytes(3, body)
            parts.append(field_bytes(1, encoded))
        return b"".join(parts)

    # Creation.

    async def create(self, request: domain_pb2.CreateDomainRequest, call: Call) -> operations_pb2.Operation:
        """Make a domain: see `CreateDomain`."""
        repeated = await self._context.operations.repeated(call, request)
        if repeated is not None:
            return repeated
        draft = await self._creation.draft(request, call)
        if request.validate_only:
            await self._context.store.rehearse(lambda tx: self._creation.accept(tx, draft))
            return self._context.operations.plan(draft.domain)
        return await self.create_draft(draft, request, call, lambda tx: self._creation.accept(tx, draft))

    async def create_draft(
        self,
        draft: Draft,
        request: domain_pb2.CreateDomainRequest | domain_pb2.UpdateDomainRequest,
        call: Call,
        accept: Intent,
    ) -> operations_pb2.Operation:
        """Make a domain that has been decided on, if it is accepted."""
        context, creation = self._context, self._creation
        method = requests.method_name(call)

        async def work(job: Job) -> Commit:
            # First of all: it may be cancelled while it waits for the hold.
            job.on_failure(lambda tx, _error: creation.forget(tx, draft.creating))
            hold = await context.occupation.hold(job, draft.domain.uid)
            failpoints.reach("compute.create.intent")
            async with AsyncExitStack() as undo:
                run = await creation.make(
                    draft, call, undo, lambda phase: job.progress(phase=phase), job.operation_name
                )
                hold.seen = run.observation if run is not None else None
                job.cancellable = False
                undo.pop_all()
            failpoints.reach("compute.create.made")
            return lambda tx: creation.record(tx, draft, run, method)

        return await context.operations.run(
            call,
            request,
            target=draft.domain.name,
            target_uid=draft.domain.uid,
            work=work,
            intent=accept,
        )

    # Deletion.

    async def delete(self, request: domain_pb2.DeleteDomainRequest, call: Call) -> operations_pb2.Operation:
        """Delete a domain: see `DeleteDomain`."""
        context = self._context
        method = requests.method_name(call)
        if request.delete_volumes:
            self._authorize_volumes(request.name, call)
        if request.validate_only:
            try:
                domain = context.domain(request.name)
            except ResourceNotFound:
                if request.allow_missing:
                    return context.operations.plan(empty_pb2.Empty())
                raise
            self.check_delete(domain, request)
            return context.operations.plan(empty_pb2.Empty())
        missing = False

        def intent(tx: Transaction) -> str:
            nonlocal missing
            missing = tx.get(request.name) is None
            if missing and request.allow_missing:
                return ""
            domain = read_checked(tx, context, request.name, request.etag, request.expected_uid)
            self.check_delete(domain, request)
            records.begin_deletion(tx, domain.uid, volumes=request.delete_volumes)
            return domain.uid

        async def work(job: Job) -> Commit:
            if missing:
                return lambda _tx: empty_pb2.Empty()
            domain = context.domain(request.name)
            job.on_failure(lambda tx, _error: records.end_deletions(tx, [request.name]))
            hold = await context.occupation.hold(job, domain.uid)
            domain = context.domain(request.name)
            await self.take_down(
                domain,
                hold,
                cause=method,
                delete_volumes=request.delete_volumes,
                stop=request.stop,
                call=call,
                job=job,
            )
            return lambda tx: self.record_delete(tx, domain, method)

        return await context.operations.run(call, request, target=request.name, work=work, intent=intent)

    def _authorize_volumes(self, name: str, call: Call) -> None:
        row = self._context.store.get(name)
        if row is not None:
            for volume in self.volumes_of(row.uid):
                call.authorize(volume, "volumes.delete")

    def volumes_of(self, uid: str) -> list[str]:
        """Return the volumes that were made with a domain."""
        body = self._context.store.get_record(records.VOLUMES, uid)
        return body.decode().splitlines() if body else []

    @staticmethod
    def check_delete(domain: domain_pb2.Domain, request: domain_pb2.DeleteDomainRequest) -> None:
        """Say whether a domain may be deleted.

        Raises:
            EtagMismatch, UidMismatch: It is not what the caller means.
            DeletionProtected: It is protected.
            WrongState: It is active and `stop` is not set.
        """
        resources.check_preconditions(domain, request.etag, request.expected_uid)
        if domain.spec.deletion_protection:
            raise DeletionProtected(
                f"{domain.name} is protected: clear spec.deletion_protection first", resource=domain.name
            )
        if not request.stop:
            lifecycle.judge(Verb.DELETE, domain)

    async def take_down(  # all but the domain and its hold are named
        self,
        domain: domain_pb2.Domain,
        hold: Hold,
        *,
        cause: str,
        delete_volumes: bool,
        stop: bool,
        call: Call | None,
        job: Job | None = None,
    ) -> None:
        """Do what a deletion does beside the record: stop, give ports up, forget the definition, delete volumes.

        Every step may be repeated after a failure.

        Raises:
            WrongState: The domain has become active and is not to be stopped.
            VirtfleetError: What the driver or storage answered.
        """
        context = self._context
        if not stop:
            lifecycle.judge(Verb.DELETE, domain)
        driver = context.driver(domain)
        if statuses.is_active(domain):
            if job is not None:
                job.progress(phase="ending the guest")
            hold.seen = await driver.stop(ref(domain))
            await self._guests.let_go(domain)
            observation = hold.seen
            await context.store.write(lambda tx: self._record_stop(tx, domain, observation, cause))
        if job is not None:
            job.cancellable = False
            job.progress(phase="removing the definition")
        failpoints.reach("compute.delete.stopped")
        await driver.undefine(ref(domain))
        ports = [card.port for card in domain.status.interfaces if self._owns(domain, card.port)]
        if ports:
            await context.wiring.unreserve(ref(domain), ports)
        if delete_volumes:
            for volume in self.volumes_of(domain.uid):
                await self._creation.delete_volume(records.Making(volume, "", domain.uid), call)
        failpoints.reach("compute.delete.undone")

    async def finish_delete(self, domain: domain_pb2.Domain, cause: str) -> Commit:
        """Finish a deletion that a crash cut; it was allowed, and part of it may be done.

        Volumes that go with the domain are left to the sweep: storage may not be there yet.
        """
        body = self._context.store.get_record(records.DELETE, domain.uid)
        volumes = self.volumes_of(domain.uid) if body == b"volumes" else []
        await self.take_down(
            domain, Hold(domain.uid), cause=statuses.OBSERVED, delete_volumes=False, stop=False, call=None
        )

        def record(tx: Transaction) -> empty_pb2.Empty:
            for volume in volumes:
                records.keep_leftover(tx, records.Making(volume, "", domain.uid))
            return self.record_delete(tx, domain, cause)

        return record

    @staticmethod
    def _owns(domain: domain_pb2.Domain, port: str) -> bool:
        return names.id_of(port).startswith(names.id_of(domain.name)[:20])

    @staticmethod
    def _record_stop(tx: Transaction, domain: domain_pb2.Domain, observation: DomainObservation, cause: str) -> None:
        row = tx.get(domain.name)
        if row is None:
            return
        stored = domain_pb2.Domain.FromString(row.body)
        old_state = stored.status.state
        statuses.observed(stored, observation)
        records.save(tx, stored, cause, old_state=old_state)

    @staticmethod
    def record_delete(tx: Transaction, domain: domain_pb2.Domain, cause: str) -> empty_pb2.Empty:
        """Record that a domain is gone."""
        row = tx.get(domain.name)
        if row is not None and row.uid == domain.uid:
            records.remove(tx, domain_pb2.Domain.FromString(row.body), cause)
        return empty_pb2.Empty()
