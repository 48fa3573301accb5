"""The Python client's informers over a fleet that breaks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.fake.fleet import Fake, running
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fake.v1 import fake_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.type.v1 import watch_pb2
from virtfleet_client import AsyncInformer, Credentials, Informer, connect, connect_async, errors
from virtfleet_client.informer import LABEL, NODE, Change, ChangeKind


@pytest.fixture(scope="module")
def shared() -> Iterator[Fake]:
    with running("--nodes", "3", "--domains", "20") as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake) -> Iterator[Fake]:
    yield shared
    shared.clear()


def eventually(true: Callable[[], bool], seconds: float = 15.0) -> None:
    ends_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends_at, "it does not become true"
        time.sleep(0.02)


def label(fake: Fake, name: str, value: str) -> None:
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, labels={"seen": value}))
    update.update_mask.paths.append("labels")
    fake.fleet.wait(fake.fleet.domains.UpdateDomain(update), domain_pb2.Domain)


@pytest.mark.parametrize("what", ["cut", "killed", "drained"])
def test_it_goes_on_without_a_new_snapshot(fake: Fake, what: str) -> None:
    with Informer(fake.fleet, domain_pb2.Domain) as domains:
        domains.wait_synced(30)
        assert len(domains) == 60
        assert domains.count_by(NODE, "nodes/n2") == 20
        before = fake.control.GetFake(fake_pb2.GetFakeRequest())
        if what == "cut":
            fake.control.CutConnections(fake_pb2.CutConnectionsRequest())
        else:
            fake.control.RestartGateway(fake_pb2.RestartGatewayRequest(drain=what == "drained"))
        label(fake, "nodes/n2/domains/d-00003", what)
        eventually(lambda: domains.count_by(LABEL, f"seen={what}") == 1)
        after = fake.control.GetFake(fake_pb2.GetFakeRequest())
        assert after.fresh_watch_count == before.fresh_watch_count
        assert after.resumed_watch_count > before.resumed_watch_count
        assert len(domains) == 60


def test_a_history_that_is_gone_is_read_anew(fake: Fake) -> None:
    changes: list[Change[domain_pb2.Domain]] = []
    with Informer(fake.fleet, domain_pb2.Domain) as domains:
        domains.handle(changes.append)
        domains.wait_synced(30)
        fake.inject("n1", away=fake_pb2.Away())
        eventually(lambda: domains.source("nodes/n1").state == watch_pb2.SOURCE_STATE_STALE)
        assert len(domains) == 60, "what was last seen stays"
        fake.clear()
        eventually(lambda: domains.source("nodes/n1").state == watch_pb2.SOURCE_STATE_LIVE)
        assert not any(change.kind is ChangeKind.DELETED for change in changes)


def test_changes_begin_with_what_is_there(fake: Fake) -> None:
    with Informer(fake.fleet, domain_pb2.Domain, parent="nodes/n3") as domains:
        domains.wait_synced(30)
        seen: list[Change[domain_pb2.Domain]] = []
        reader = threading.Thread(target=lambda: seen.extend(domains.changes()))
        reader.start()
        eventually(lambda: len(seen) == 20)
        label(fake, "nodes/n3/domains/d-00001", "changes")
        eventually(lambda: any(one.kind is ChangeKind.CHANGED for one in seen))
    reader.join(10)
    assert not reader.is_alive(), "the end of the informer is the end of its changes"
    assert {one.kind for one in seen[:20]} == {ChangeKind.ADDED}


def test_nodes_are_a_kind_too(fake: Fake) -> None:
    with Informer(fake.fleet, node_pb2.Node) as nodes:
        nodes.wait_synced(30)
        assert nodes.names() == ["nodes/n1", "nodes/n2", "nodes/n3"]


async def test_the_asyncio_one_does_the_same(fake: Fake) -> None:
    files = Credentials(*(Path(fake.ready[key]) for key in ("ca_file", "cert_file", "key_file")))
    async with (
        connect_async(f"tls://{fake.ready['address']}", files) as fleet,
        AsyncInformer(fleet, domain_pb2.Domain) as domains,
    ):
        await domains.wait_synced(30)
        assert len(domains) == 60
        await asyncio.to_thread(fake.control.CutConnections, fake_pb2.CutConnectionsRequest())
        await asyncio.to_thread(label, fake, "nodes/n1/domains/d-00002", "async")
        async with asyncio.timeout(15):
            async for change in domains.changes():
                if change.resource is not None and change.resource.labels["seen"] == "async":
                    break


def test_a_new_certificate_is_used_without_a_new_client(fake: Fake, tmp_path: Path) -> None:
    folder = Path(fake.ready["ca_file"]).parent

    def give(role: str) -> None:
        for kind in ("crt", "key"):
            fresh = tmp_path / f"fresh.{kind}"
            fresh.write_bytes((folder / f"{role}.{kind}").read_bytes())
            fresh.replace(tmp_path / f"me.{kind}")

    give("viewer")
    mine = Credentials(folder / "ca.crt", tmp_path / "me.crt", tmp_path / "me.key")
    with connect(f"tls://{fake.ready['address']}", mine) as fleet:
        from virtfleet.common.v1 import admin_pb2

        assert list(fleet.access.WhoAmI(admin_pb2.WhoAmIRequest()).roles) == ["viewer"]
        give("operator")
        eventually(lambda: list(fleet.access.WhoAmI(admin_pb2.WhoAmIRequest()).roles) == ["operator"])
        assert fleet.access.WhoAmI.future(admin_pb2.WhoAmIRequest()).result(10).transport == "tls"


def test_a_helper_process_gives_any_transport(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for `virtfleet proxy`: a socket to the gateway's port, until standard input ends.
    program = tmp_path / "helper"
    program.write_text(
        f"#!{sys.executable}\n"
        "import asyncio, sys\n"
        f"path, host, port = {str(tmp_path / 'sock')!r}, *{fake.ready['address']!r}.split(':')\n"
        "async def take(reader, writer):\n"
        "    r, w = await asyncio.open_connection(host, int(port))\n"
        "    async def pass_(a, b):\n"
        "        while data := await a.read(65536):\n"
        "            b.write(data)\n"
        "    await asyncio.gather(pass_(reader, w), pass_(r, writer))\n"
        "async def main():\n"
        "    await asyncio.start_unix_server(take, path)\n"
        "    print(path, flush=True)\n"
        "    await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("VIRTFLEET_COMMAND", str(program))
    files = Credentials(*(Path(fake.ready[key]) for key in ("ca_file", "cert_file", "key_file")))
    with connect("ssh://somewhere?to=gateway:7443&server_name=localhost", files) as fleet:
        assert len(fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/n1")).domains) == 20
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(program) not in listed, "the helper is left"


async def test_who_waits_for_what_is_not_reached_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTFLEET_COMMAND", str(Path(sys.executable).with_name("virtfleet")))
    uri = f"command:{sys.executable}?arg=-c&arg=import+sys%3Bsys.exit('no+way+there')"
    with connect(uri) as fleet, Informer(fleet, domain_pb2.Domain) as domains:
        with pytest.raises(TimeoutError, match="no way there") as late:
            domains.wait_synced(5)
        assert isinstance(late.value.__cause__, errors.Unavailable)
        assert domains.obstacle is late.value.__cause__
    async with connect_async(uri) as other, AsyncInformer(other, domain_pb2.Domain) as same:
        with pytest.raises(TimeoutError, match="no way there"):
            await same.wait_synced(5)
