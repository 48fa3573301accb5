"""Stores and the authority are put back from copies while the fleet lives: what is told, and what stays denied."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509

from bench.stage import NODE, credentials, endpoint, ready
from tests.fleet.rig import small_spec
from tools import fleet as development
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet.fleet.v1 import watch_pb2 as fleet_watch
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import AsyncFleet, Credentials, VirtfleetError, connect_async
from virtfleet_client.endpoint import Endpoint

PARENT = f"nodes/{NODE}"
END = "the end of a snapshot"
REVOKED_SECONDS = 8.0
"""Five are promised; the rest is this machine's."""

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet() -> AsyncIterator[development.Fleet]:
    """Yield a fleet with a node whose domains live in memory."""
    async with development.Fleet.running(development.Plan(driver="test")) as made:
        yield made


async def command(*arguments: str) -> str:
    """Run the command as an operator does; returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "virtfleet_cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def person(fleet: development.Fleet, name: str) -> tuple[Credentials, str]:
    """Have a certificate made for somebody; returns it with its name."""
    folder = fleet.folder / f"person-{name}"
    authority = str(fleet.folder / "authority")
    await command("authority", "issue", name, "--role", "admin", "--directory", authority, "--output", str(folder))
    leaf = x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())
    files = Credentials(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")
    return files, f"certificates/c{leaf.serial_number:x}"


@asynccontextmanager
async def stopped(fleet: development.Fleet, program: str) -> AsyncIterator[None]:
    """Stop a program of the fleet for the length of a block."""
    known = fleet.supervisor.programs[program]
    await fleet.supervisor.stop(program)
    yield
    await fleet.supervisor.start(known)


async def eventually(holds: Callable[[], Awaitable[Any]], seconds: float, what: str) -> Any:
    """Look until something holds; a call that fails on the way is a `not yet`."""
    ends_at = time.monotonic() + seconds
    while True:
        try:
            found: Any = await holds()
        except VirtfleetError as error:
            found, last = None, repr(error)
        else:
            last = repr(found)
        if found:
            return found
        assert time.monotonic() < ends_at, f"{what} does not hold after {seconds} s: {last}"
        await asyncio.sleep(0.1)


async def refused(place: Endpoint, who: Credentials) -> bool:
    """Tell whether a caller is not believed at a place, over a connection of its own."""
    connection = AsyncFleet(place, who)
    try:
        await connection.domains.ListDomains(domain_pb2.ListDomainsRequest(parent=PARENT), timeout=5)
    except VirtfleetError as error:
        if error.reason == "CERTIFICATE_REVOKED":
            return True
        raise
    finally:
        await connection.close()
    return False


async def revoke(connection: AsyncFleet, name: str) -> None:
    """Put a certificate on the denial list."""
    request = enrollment_pb2.RevokeCertificateRequest(name=name, allow_missing=True)
    await connection.enrollment.RevokeCertificate(request, timeout=5)


async def define(connection: AsyncFleet, domain_id: str) -> domain_pb2.Domain:
    """Make a domain."""
    request = domain_pb2.CreateDomainRequest(
        parent=PARENT, domain_id=domain_id, domain=domain_pb2.Domain(spec=small_spec())
    )
    return await ready(connection, await connection.domains.CreateDomain(request), domain_pb2.Domain)


async def test_a_gateway_put_back_from_a_copy_denies_what_it_denied(fleet: development.Fleet, tmp_path: Path) -> None:
    gateway, node = endpoint(fleet), endpoint(fleet, "compute")
    store, authority = fleet.folder / "gateway/gateway.db", fleet.folder / "authority"
    async with connect_async(f"tls://{fleet.address}", credentials(fleet)) as admin:
        early, _ = await person(fleet, "early")
        later, later_name = await person(fleet, "later")
        await command("store", "backup", str(store), str(tmp_path / "gateway.db"))
        shutil.copytree(authority, tmp_path / "authority")
        # What the copy does not know: a certificate that is denied, and one that is issued and denied.
        newest, newest_name = await person(fleet, "newest")
        for name in (later_name, newest_name):
            await revoke(admin, name)
        for who in (later, newest):
            await eventually(lambda who=who: refused(node, who), REVOKED_SECONDS, "the node denies")  # type: ignore[misc]  # bound at once
        before = await admin.servers.GetServer(admin_pb2.GetServerRequest(name=f"{PARENT}/services/compute"), timeout=5)
        async with stopped(fleet, "gateway"):
            # The machine is lost with all that was on it.
            shutil.rmtree(fleet.folder / "gateway")
            shutil.rmtree(authority)
            shutil.copytree(tmp_path / "authority", authority)
            store.parent.mkdir()
            await command("store", "restore", str(tmp_path / "gateway.db"), str(store))
        listed = enrollment_pb2.ListCertificatesRequest()
        await eventually(lambda: admin.enrollment.ListCertificates(listed, timeout=5), 20, "the gateway serves again")
        for who in (later, newest):
            await eventually(lambda who=who: refused(gateway, who), REVOKED_SECONDS, "the gateway denies again")  # type: ignore[misc]  # as above
            assert await refused(node, who)
        assert not await refused(gateway, early)
        certificates = {one.name: one async for one in admin.pages(admin.enrollment.ListCertificates, listed)}
        certificate = certificates[newest_name]
        assert certificate.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED
        assert certificate.status.revoke_reason == "denied before a restore"
        # What is denied from now on is taken too.
        early_name = (
            f"certificates/c{x509.load_pem_x509_certificate(early.certificate_file.read_bytes()).serial_number:x}"
        )
        await revoke(admin, early_name)
        for place in (gateway, node):
            await eventually(lambda place=place: refused(place, early), REVOKED_SECONDS, "a new denial holds")  # type: ignore[misc]  # as above
        after = await admin.servers.GetServer(admin_pb2.GetServerRequest(name=f"{PARENT}/services/compute"), timeout=5)
        assert after.denial_list_number > before.denial_list_number
        assert await refused(node, later)


async def test_watchers_go_on_over_a_gateway_that_was_put_back(fleet: development.Fleet, tmp_path: Path) -> None:
    store = fleet.folder / "gateway/gateway.db"
    async with connect_async(f"tls://{fleet.address}", credentials(fleet)) as admin:
        await command("store", "backup", str(store), str(tmp_path / "gateway.db"))
        await define(admin, "before")
        follower = Follower(admin)
        await follower.until(lambda: f"{PARENT}/domains/before" in follower.known)
        async with stopped(fleet, "gateway"):
            await command("store", "restore", str(tmp_path / "gateway.db"), str(store))
        await eventually(lambda: define(admin, "after"), 20, "the node is reached again")
        await follower.until(lambda: f"{PARENT}/domains/after" in follower.known)
        # The tokens are the nodes' own: nothing had to be told anew.
        assert type_watch_pb2.SOURCE_STATE_RESYNCING not in follower.states
        assert follower.snapshots == 1
        await follower.close()


async def give_token(connection: AsyncFleet, id_: str) -> str:
    """Have a join token made: a resource of the gateway itself."""
    request = enrollment_pb2.CreateJoinTokenRequest(join_token_id=id_)
    request.join_token.spec.node = "nodes/nobody"
    return str((await connection.enrollment.CreateJoinToken(request, timeout=5)).name)


async def test_watchers_of_the_gateway_itself_are_told_of_the_gap_when_it_is_put_back(
    fleet: development.Fleet, tmp_path: Path
) -> None:
    """Its nodes, tokens and certificates are of its own store: what it had told since the copy never was."""
    store = fleet.folder / "gateway/gateway.db"
    kinds = [fleet_watch.RESOURCE_TYPE_JOIN_TOKEN]
    async with connect_async(f"tls://{fleet.address}", credentials(fleet)) as admin:
        kept = await give_token(admin, "kept")
        await command("store", "backup", str(store), str(tmp_path / "gateway.db"))
        told: list[tuple[str, str]] = []
        news = asyncio.Event()

        async def follow() -> None:
            async for answer in admin.watch(fleet_watch.WatchResourcesRequest(resource_types=kinds), resnapshot=True):
                puts = [one.put.join_token.name for one in answer.changes if one.HasField("put")]
                told.extend((name, answer.resume_token) for name in puts)
                if answer.WhichOneof("marker") == "snapshot_end":
                    told.append((END, ""))
                news.set()

        def names(since: int = 0) -> list[str]:
            return [name for name, _ in told[since:]]

        async def until(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not holds():
                    news.clear()
                    await news.wait()

        following = asyncio.create_task(follow())
        await until(lambda: END in names())
        lost = await give_token(admin, "lost")
        await until(lambda: lost in names())
        token = dict(told)[lost]
        async with stopped(fleet, "gateway"):
            gap = len(told)
            await command("store", "restore", str(tmp_path / "gateway.db"), str(store))
        # As many changes as were lost, and more: their numbers have all been given before.
        after = await eventually(lambda: give_token(admin, "after"), 20, "the gateway serves again")
        for number in range(4):
            await give_token(admin, f"more-{number}")
        await until(lambda: END in names(gap) and after in names(gap))
        assert names(gap).count(END) == 1, "told anew, once"
        assert kept in names(gap)[: names(gap).index(END)]
        assert lost not in names(gap)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        request = fleet_watch.WatchResourcesRequest(resource_types=kinds, resume_token=token)
        with pytest.raises(VirtfleetError) as gone:
            await anext(admin.watch(request))
        assert (gone.value.code().name, gone.value.reason) == ("OUT_OF_RANGE", "RESUME_TOKEN_COMPACTED")


async def test_watchers_are_told_of_the_gap_when_a_node_is_put_back(fleet: development.Fleet, tmp_path: Path) -> None:
    store = fleet.folder / NODE / "state/compute.db"
    async with (
        connect_async(f"tls://{fleet.address}", credentials(fleet)) as admin,
        connect_async(f"unix://{fleet.folder / NODE / 'run/compute/admin.sock'}") as local,
    ):
        kept = await define(admin, "kept")
        await command("store", "backup", str(store), str(tmp_path / "compute.db"))
        lost = await define(admin, "lost")
        follower = Follower(admin)
        await follower.until(lambda: lost.name in follower.known)
        token = await place_of(local)
        async with stopped(fleet, f"{NODE}/compute"):
            await command("store", "restore", str(tmp_path / "compute.db"), str(store))
        made = await eventually(lambda: define(admin, "made-after"), 20, "the node is reached again")
        # As many changes as were lost, and more: their numbers have all been given before.
        for number in range(4):
            await define(admin, f"more-{number}")
        await follower.until(lambda: made.name in follower.known and lost.name not in follower.known)
        assert type_watch_pb2.SOURCE_STATE_RESYNCING in follower.states
        assert kept.name in follower.known
        await follower.close()
        with pytest.raises(VirtfleetError) as gone:
            await anext(local.watch(watch_pb2.WatchResourcesRequest(parent=PARENT, resume_token=token)))
        assert (gone.value.code().name, gone.value.reason) == ("OUT_OF_RANGE", "RESUME_TOKEN_COMPACTED")
        with pytest.raises(VirtfleetError) as missing:
            await admin.domains.GetDomain(domain_pb2.GetDomainRequest(name=lost.name), timeout=5)
        assert missing.value.reason == "RESOURCE_NOT_FOUND"


async def place_of(connection: AsyncFleet) -> str:
    """Return the token of the present of a node."""
    request = watch_pb2.WatchResourcesRequest(parent=PARENT)
    async for answer in connection.watch(request):
        if answer.WhichOneof("marker") == "snapshot_end":
            return str(answer.resume_token)
    raise AssertionError("the watch ended")


class Follower:
    """Follows the fleet's watch and remembers what it was told."""

    def __init__(self, connection: AsyncFleet) -> None:
        self.known: set[str] = set()
        self.states: list[int] = []
        self.snapshots = 0
        self._connection = connection
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        resyncing: set[str] | None = None
        async for answer in self._connection.watch(watch_pb2.WatchResourcesRequest(parent="nodes/-")):
            marker = answer.WhichOneof("marker")
            if marker == "source_status":
                self.states.append(answer.source_status.state)
                if answer.source_status.state == type_watch_pb2.SOURCE_STATE_RESYNCING:
                    resyncing = set()
                elif resyncing is not None:
                    self.known = resyncing
                    resyncing = None
            self.snapshots += marker == "snapshot_end"
            for change in answer.changes:
                into = self.known if resyncing is None else resyncing
                if change.WhichOneof("kind") == "put" and change.put.WhichOneof("resource") == "domain":
                    into.add(change.put.domain.name)
                elif change.WhichOneof("kind") == "delete":
                    into.discard(change.delete.name)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until what was told makes something hold."""
        ends_at = time.monotonic() + 20
        while not holds():
            assert not self._task.done(), self._task.exception()
            assert time.monotonic() < ends_at, (self.known, self.states)
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End the watch."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
