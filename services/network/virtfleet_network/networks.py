"""Networks: define, change, start, stop, delete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from google.protobuf import empty_pb2
from google.protobuf.message import Message

from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_network import addresses, records
from virtfleet_network.backends.api import NetworkBackend
from virtfleet_network.definitions import Definitions, emit_change
from virtfleet_service import longrunning, names, resources
from virtfleet_service.errors import (
    ChangeRolledBack,
    DriverBroken,
    HasChildren,
    ResourceInUse,
    ResourceNotFound,
    VirtfleetError,
    WrongState,
)
from virtfleet_service.failpoints import reach
from virtfleet_service.operations import Commit, Handler, Job, JournalEntry, Operations, plan
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    from google.longrunning import operations_pb2

    from virtfleet_service.call import Call

__all__ = ["Networks"]

_log = logging.getLogger(__name__)

AUTOSTART_WAIT_SECONDS = 60.0
"""How long the start of one network by itself may take before the next ones have their turn."""

_SERVICE = "virtfleet.network.v1.NetworkService"
_CREATE, _UPDATE, _DELETE = f"{_SERVICE}.CreateNetwork", f"{_SERVICE}.UpdateNetwork", f"{_SERVICE}.DeleteNetwork"
_START, _STOP = f"{_SERVICE}.StartNetwork", f"{_SERVICE}.StopNetwork"


class Networks:
    """Drives networks through their lives: store and back end in the right order, undone on failure."""

    def __init__(self, store: Store, operations: Operations, backend: NetworkBackend) -> None:
        self._store = store
        self._operations = operations
        self._backend = backend
        self._definitions = Definitions(backend)
        self._refreshes: dict[str, _Refresh] = {}

    # Create.

    async def create(self, call: Call, request: network_pb2.CreateNetworkRequest) -> operations_pb2.Operation:
        """Answer CreateNetwork."""
        name = names.child(request.parent, "networks", names.check_id(request.network_id, "network_id"))
        network = self._definitions.new(name, request.network, call)
        start = request.start or network.spec.lifetime == resource_pb2.LIFETIME_TRANSIENT
        if request.validate_only:
            await self._store.write(lambda tx: self._definitions.check_new(tx, network))
            await self._check_node(network, start=start)
            return plan(network)

        def intent(tx: Transaction) -> str:
            self._definitions.check_new(tx, network)
            if start:
                records.record_bridge(tx, network)
            records.count(tx, network)
            tx.put("network", network, cause=_CREATE)
            records.emit(tx, network, watch_pb2.EVENT_TYPE_NETWORK_DEFINED, "CREATED", f"{name} was defined")
            return network.uid

        async def work(job: Job) -> Commit:
            job.on_failure(lambda tx, _error: self.remove_rows(tx, network.uid, name, _CREATE))
            reach("network.create.recorded")
            await self._check_node(network, start=start)
            if start:
                try:
                    return await self._start(job, name, _CREATE)
                except BaseException:
                    await self._backend.forget(network.uid)
                    raise
            return lambda tx: records.network_of(tx.need(name))

        return await self._operations.run(call, request, target=name, target_uid=network.uid, intent=intent, work=work)

    async def _check_node(self, network: network_pb2.Network, *, start: bool) -> None:
        try:
            await self._backend.check(records.plan_of(network, ()))
        except DriverBroken:
            # A definition may wait for what the node lacks yet.
            if start:
                raise

    @staticmethod
    def remove_rows(tx: Transaction, uid: str, name: str, cause: str) -> None:
        """Remove a network with all that hangs on it, and what is written down about it."""
        network = tx.get(name)
        for kind in ("lease", "port"):
            for row in tx.list(kind, parent=name):
                if kind == "port":
                    port = records.port_of(row)
                    addresses.unreserve(tx, uid, port.status.mac_address, port.status.addresses)
                tx.delete(row.name, cause=cause)
        for space in (records.LINKS, *records.ENDING):
            tx.delete_record(space, uid)
        addresses.forget(tx, uid)
        if network is not None and network.uid == uid:
            message = f"{name} was deleted"
            records.emit(tx, records.network_of(network), watch_pb2.EVENT_TYPE_NETWORK_UNDEFINED, "DELETED", message)
            tx.delete(name, cause=cause)

    # Start.

    async def start(self, call: Call, request: network_pb2.StartNetworkRequest) -> operations_pb2.Operation:
        """Answer StartNetwork."""
        name = request.name
        if request.validate_only:
            network = await self._store.write(lambda tx: self._checked(tx, name, request.etag, request.expected_uid))
            if not records.is_up(network):
                await self._backend.check(records.current_plan(self._store, network))
            return plan(network)

        async def work(job: Job) -> Commit:
            return await self._start(job, name, _START)

        return await self._operations.run(call, request, target=name, intent=self._intends(request), work=work)

    def _intends(self, request: network_pb2.StartNetworkRequest) -> Callable[[Transaction], str]:
        def intent(tx: Transaction) -> str:
            network = self._checked(tx, request.name, request.etag, request.expected_uid)
            if not records.is_up(network):
                records.record_bridge(tx, network)
            return network.uid

        return intent

    @staticmethod
    def _checked(tx: Transaction, name: str, etag: str, expected_uid: str) -> network_pb2.Network:
        network = records.need_network(tx, name)
        resources.check_preconditions(network, etag, expected_uid)
        return network

    async def _start(
        self,
        job: Job,
        name: str,
        cause: str,
        reason: network_pb2.NetworkStateReason.ValueType = network_pb2.NETWORK_STATE_REASON_STARTED,
    ) -> Commit:
        network = records.network_of(self._store.need(name))
        if records.is_up(network):
            return lambda tx: records.network_of(tx.need(name))
        if cause == _START:
            job.on_failure(lambda tx, error: self._start_failed(tx, name, error, cause))
        job.progress(phase="making bridge, rules and DHCP")
        reach("network.start.recorded")
        await self._backend.start(records.current_plan(self._store, network))
        reach("network.start.done")
        job.cancellable = False
        return lambda tx: self._started(tx, name, cause, reason)

    @staticmethod
    def _started(
        tx: Transaction, name: str, cause: str, reason: network_pb2.NetworkStateReason.ValueType
    ) -> network_pb2.Network:
        network = records.network_of(tx.need(name))
        records.set_state(network, network_pb2.NETWORK_STATE_RUNNING, reason)
        network.status.active_spec.CopyFrom(network.status.resolved_spec)
        network.status.observed_generation = network.generation
        network.status.start_time.CopyFrom(resources.now())
        once = network.spec.autostart == resource_pb2.AUTOSTART_ONCE
        if once and reason == network_pb2.NETWORK_STATE_REASON_AUTOSTARTED:
            for spec in (network.spec, network.status.resolved_spec, network.status.active_spec):
                spec.autostart = resource_pb2.AUTOSTART_NEVER
            resources.touch(network)
            network.status.observed_generation = network.generation
        tx.put("network", network, cause=cause)
        text = network_pb2.NetworkStateReason.Name(reason).removeprefix("NETWORK_STATE_REASON_")
        records.emit(tx, network, watch_pb2.EVENT_TYPE_NETWORK_STARTED, text, f"{name} runs")
        return network

    @staticmethod
    def _start_failed(tx: Transaction, name: str, error: VirtfleetError, cause: str) -> None:
        row = tx.get(name)
        if row is None:
            return
        network = records.network_of(row)
        records.set_state(
            network,
            network_pb2.NETWORK_STATE_INACTIVE,
            network_pb2.NETWORK_STATE_REASON_START_FAILED,
            f"{error.reason}: {error.message}",
        )
        tx.delete_record(records.LINKS, network.uid)
        tx.put("network", network, cause=cause)

    async def autostart(self, name: str, call: Call) -> bool:
        """Start a network on the service's own account.

        Returns:
            Whether that is all there is to do: it runs, or is gone. A failure stands in its status and the log.
        """
        request = network_pb2.StartNetworkRequest(name=name)
        reason = network_pb2.NETWORK_STATE_REASON_AUTOSTARTED

        async def work(job: Job) -> Commit:
            return await self._start(job, name, _START, reason)

        try:
            operation = await self._operations.run(call, request, target=name, intent=self._intends(request), work=work)
            if not operation.done:
                operation = await self._operations.wait(operation.name, AUTOSTART_WAIT_SECONDS)
        except ResourceNotFound:
            return True
        except VirtfleetError as error:
            _log.warning("%s does not start by itself yet: %s", name, error)
            return False
        if operation.HasField("error"):
            _log.warning("%s does not start by itself yet: %s", name, operation.error.message)
        return operation.HasField("response")

    # Stop.

    async def stop(self, call: Call, request: network_pb2.StopNetworkRequest) -> operations_pb2.Operation:
        """Answer StopNetwork."""
        name = request.name

        def check(tx: Transaction) -> network_pb2.Network:
            network = self._checked(tx, name, request.etag, request.expected_uid)
            if records.is_up(network) and not request.force:
                self._refuse_plugged(tx, network)
            return network

        if request.validate_only:
            return plan(await self._store.write(check))

        def intent(tx: Transaction) -> str:
            uid = check(tx).uid
            tx.put_record(records.STOPPING, uid, b"")
            return uid

        async def work(job: Job) -> Commit:
            uid = self._store.need(name).uid
            job.on_failure(lambda tx, _error: _discard(tx.delete_record(records.STOPPING, uid)))
            job.progress(phase="removing DHCP, rules and bridge")
            return await self._stop(name, _STOP)

        return await self._operations.run(call, request, target=name, intent=intent, work=work, cancellable=False)

    @staticmethod
    def _refuse_plugged(tx: Transaction, network: network_pb2.Network) -> None:
        for row in tx.list("port", parent=network.name):
            port = records.port_of(row)
            if port.status.state == port_pb2.PORT_STATE_PLUGGED:
                holder = port.status.holder.domain or port.name
                raise ResourceInUse(
                    f"{network.name} is used by {holder} through {port.name}; stop that first, or use force",
                    resource=network.name,
                    holder=holder,
                    port=port.name,
                )

    async def _stop(self, name: str, cause: str) -> Commit:
        network = records.network_of(self._store.need(name))
        reach("network.stop.recorded")
        await self._backend.stop(records.current_plan(self._store, network))
        reach("network.stop.done")
        transient = network.spec.lifetime == resource_pb2.LIFETIME_TRANSIENT
        if transient:
            await self._backend.forget(network.uid)
        return lambda tx: self._stopped(tx, name, cause, transient=transient)

    def _stopped(self, tx: Transaction, name: str, cause: str, *, transient: bool) -> network_pb2.Network:
        network = records.network_of(tx.need(name))
        ran = records.is_up(network)
        records.set_state(network, network_pb2.NETWORK_STATE_INACTIVE, network_pb2.NETWORK_STATE_REASON_STOPPED)
        network.status.observed_generation = network.generation
        for space in (records.LINKS, records.STOPPING):
            tx.delete_record(space, network.uid)
        if ran:
            tx.put("network", network, cause=cause)
            records.emit(tx, network, watch_pb2.EVENT_TYPE_NETWORK_STOPPED, "STOPPED", f"{name} was stopped")
        if transient:
            self.remove_rows(tx, network.uid, name, cause)
        return network

    # Delete.

    async def delete(self, call: Call, request: network_pb2.DeleteNetworkRequest) -> operations_pb2.Operation:
        """Answer DeleteNetwork."""
        name = request.name

        def check(tx: Transaction) -> str:
            if tx.get(name) is None and request.allow_missing:
                return ""
            network = self._checked(tx, name, request.etag, request.expected_uid)
            self._refuse_children(tx, network, force=request.force)
            return network.uid

        if request.validate_only:
            await self._store.write(check)
            return plan(empty_pb2.Empty())

        def intent(tx: Transaction) -> str:
            uid = check(tx)
            if uid:
                tx.put_record(records.DELETING, uid, b"")
            return uid

        async def work(job: Job) -> Commit:
            row = self._store.get(name)
            if row is None:
                return _empty
            job.on_failure(lambda tx, _error: _discard(tx.delete_record(records.DELETING, row.uid)))
            return await self._delete(name)

        return await self._operations.run(call, request, target=name, intent=intent, work=work, cancellable=False)

    @staticmethod
    def _refuse_children(tx: Transaction, network: network_pb2.Network, *, force: bool) -> None:
        name = network.name
        if records.is_up(network) and not force:
            state = records.state_name(network)
            raise WrongState(f"{name} runs: stop it first, or use force", resource=name, state=state)
        for row in tx.list("port", parent=name):
            port = records.port_of(row)
            held = port.status.HasField("owner") or port.status.state == port_pb2.PORT_STATE_PLUGGED
            if held or not force:
                raise HasChildren(f"{name} has the port {port.name}", resource=name, holder=port.name)

    async def _delete(self, name: str) -> Commit:
        network = records.network_of(self._store.need(name))
        reach("network.delete.recorded")
        await self._backend.stop(records.current_plan(self._store, network))
        await self._backend.forget(network.uid)
        reach("network.delete.done")

        def commit(tx: Transaction) -> Message:
            self.remove_rows(tx, network.uid, name, _DELETE)
            return empty_pb2.Empty()

        return commit

    # Update.

    async def update(self, call: Call, request: network_pb2.UpdateNetworkRequest) -> operations_pb2.Operation:
        """Answer UpdateNetwork."""
        name = request.network.name
        before: list[network_pb2.Network] = []

        def change(tx: Transaction) -> network_pb2.Network:
            row = tx.get(name)
            if row is None and request.allow_missing:
                call.authorize(name, "networks.create")
                resources.check_absent(request.network)
                network = self._definitions.new(name, request.network, call)
                self._definitions.check_new(tx, network)
                return network
            network = self._checked(tx, name, request.network.etag, request.network.uid)
            before.append(records.network_of(tx.need(name)))
            self._definitions.apply(tx, network, request)
            return network

        if request.validate_only:
            return plan(await self._store.write(change))

        def intent(tx: Transaction) -> str:
            network = change(tx)
            records.count(tx, network)
            tx.put("network", network, cause=_UPDATE)
            if not before:
                records.emit(tx, network, watch_pb2.EVENT_TYPE_NETWORK_DEFINED, "CREATED", f"{name} was defined")
            else:
                emit_change(tx, before[0], network)
            return network.uid

        async def work(job: Job) -> Commit:
            network = records.network_of(self._store.need(name))
            if before and records.is_up(network):
                job.on_failure(lambda tx, _error: self._take_back(tx, before[0]))
                await self._update_running(before[0], network)
            return lambda tx: self._updated(tx, name)

        return await self._operations.run(call, request, target=name, intent=intent, work=work, cancellable=False)

    async def _update_running(self, before: network_pb2.Network, network: network_pb2.Network) -> None:
        if before.status.active_spec == network.status.active_spec:
            return
        reach("network.update.recorded")
        try:
            await self._backend.update(records.current_plan(self._store, network))
        except VirtfleetError:
            # The old plan again, so that what runs fits what is recorded; if that fails too, repair goes on trying.
            with suppress(VirtfleetError):
                await self._backend.update(records.current_plan(self._store, before))
            raise

    @staticmethod
    def _take_back(tx: Transaction, before: network_pb2.Network) -> None:
        network = records.network_of(tx.need(before.name))
        for field in ("display_name", "labels", "annotations", "spec"):
            network.ClearField(field)
        network.display_name = before.display_name
        network.labels.update(before.labels)
        network.annotations.update(before.annotations)
        network.spec.CopyFrom(before.spec)
        network.status.CopyFrom(before.status)
        resources.touch(network)
        tx.put("network", network, cause=_UPDATE)

    @staticmethod
    def _updated(tx: Transaction, name: str) -> network_pb2.Network:
        network = records.network_of(tx.need(name))
        network.status.observed_generation = network.generation
        tx.put("network", network, cause=_UPDATE)
        return network

    async def refresh(self, name: str) -> None:
        """Tell a running network's DHCP of its ports as they are now; concurrent calls share the work.

        A back end that cannot at the moment has kept the plan, and repair goes on trying: ports do not fail for it.
        """
        refresh = self._refreshes.setdefault(name, _Refresh())
        refresh.wanted += 1
        mine = refresh.wanted
        async with refresh.lock:
            if refresh.done >= mine:
                return
            refresh.done = refresh.wanted
            row = self._store.get(name)
            if row is None:
                self._refreshes.pop(name, None)
                return
            network = records.network_of(row)
            if records.is_up(network):
                try:
                    await self._backend.update(records.current_plan(self._store, network))
                except VirtfleetError as error:
                    _log.warning("DHCP of %s does not know its ports yet: %s", name, error)

    # After a crash.

    def settlements(self) -> dict[str, Handler]:
        """Return how each method's operations are ended that a crash left unfinished."""
        return {
            _CREATE: self._settle_create,
            _START: self._settle_start,
            _STOP: self._settle_with(lambda name: self._stop(name, _STOP)),
            _DELETE: self._settle_with(self._delete),
            _UPDATE: self._settle_update,
        }

    async def _settle_create(self, operation: operations_pb2.Operation, _steps: Sequence[JournalEntry]) -> Commit:
        name = _target(operation)
        row = self._store.get(name)
        if row is None:
            raise _rolled_back(operation)
        if self._store.get_record(records.LINKS, row.uid) is None:
            return lambda tx: records.network_of(tx.need(name))
        await self._backend.stop(records.current_plan(self._store, records.network_of(row)))
        await self._backend.forget(row.uid)
        await self._store.write(lambda tx: self.remove_rows(tx, row.uid, name, _CREATE))
        raise _rolled_back(operation)

    async def _settle_start(self, operation: operations_pb2.Operation, _steps: Sequence[JournalEntry]) -> Commit:
        name = _target(operation)
        network = records.network_of(self._store.need(name))
        if records.is_up(network):
            return lambda tx: records.network_of(tx.need(name))
        await self._backend.stop(records.current_plan(self._store, network))
        error = _rolled_back(operation)
        await self._store.write(lambda tx: self._start_failed(tx, name, error, _START))
        raise error

    async def _settle_update(self, operation: operations_pb2.Operation, _steps: Sequence[JournalEntry]) -> Commit:
        # The definition is recorded; the repair that follows brings what runs to it.
        name = _target(operation)
        return lambda tx: self._updated(tx, name)

    def _settle_with(self, again: Callable[[str], Awaitable[Commit]]) -> Handler:
        async def settle(operation: operations_pb2.Operation, _steps: Sequence[JournalEntry]) -> Commit:
            name = _target(operation)
            row = self._store.get(name)
            if row is None:
                return _empty
            try:
                return await again(name)
            except BaseException:
                # It failed: what is there can be used again.
                await self._store.write(lambda tx: _goes_on(tx, row.uid))
                raise

        return settle


class _Refresh:
    """Counts who wants DHCP refreshed, and up to whom it has been."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.wanted = 0
        self.done = 0


def _target(operation: operations_pb2.Operation) -> str:
    return longrunning.metadata_of(operation).target


def _rolled_back(operation: operations_pb2.Operation) -> ChangeRolledBack:
    return ChangeRolledBack(
        f"the service stopped while {operation.name} ran; what it had done is undone", operation=operation.name
    )


def _empty(_tx: Transaction) -> Message:
    return empty_pb2.Empty()


def _goes_on(tx: Transaction, uid: str) -> None:
    for space in records.ENDING:
        tx.delete_record(space, uid)


def _discard(_value: object) -> None:
    return None
