"""Consoles and counters through the gateway, and what a node says of itself."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from google.protobuf import duration_pb2

from tests.fleet.rig import MIB, State, domain, get, refused, small_spec, unique, until, verb
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import capability_pb2, console_pb2, domain_pb2, guest_agent_pb2, host_pb2, stats_pb2
from virtfleet_client import Fleet

RUNNING, SHUT_OFF = State.DOMAIN_STATE_RUNNING, State.DOMAIN_STATE_SHUT_OFF


@pytest.fixture
def guest(fleet: Fleet, nodes: list[str]) -> Iterator[domain_pb2.Domain]:
    """Yield a running domain with a serial port."""
    spec = small_spec()
    spec.serials["tty"].SetInParent()
    with domain(fleet, nodes[0], spec=spec, start="running") as made:
        yield made


class Console:
    """Is one caller at a console: what is typed, and all that is told."""

    def __init__(self, fleet: Fleet, name: str, **fields: Any) -> None:
        self._typed: queue.Queue[console_pb2.OpenConsoleRequest | None] = queue.Queue()
        fields.setdefault("device_id", "tty")
        self._typed.put(console_pb2.OpenConsoleRequest(name=name, open=console_pb2.ConsoleOpen(**fields)))
        self._stream = fleet.consoles.OpenConsole(iter(self._typed.get, None), timeout=20)
        self._news = threading.Condition()
        self.opened: console_pb2.ConsoleOpened = next(self._stream).opened
        self.text = b""
        self.closed: console_pb2.ConsoleClosed | None = None
        self.end = self.opened.offset
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for answer in self._stream:
            with self._news:
                event = answer.WhichOneof("event")
                if event == "data":
                    assert answer.data.offset == self.end, "nothing left out"
                    self.text += answer.data.data
                    self.end += len(answer.data.data)
                elif event == "closed":
                    self.closed = answer.closed
                self._news.notify_all()

    def type(self, data: bytes) -> None:
        """Type."""
        self._typed.put(console_pb2.OpenConsoleRequest(data=data))

    def resize(self) -> None:
        """Say how large the window is."""
        self._typed.put(console_pb2.OpenConsoleRequest(resize=console_pb2.ConsoleResize(column_count=80, row_count=25)))

    def leave(self) -> None:
        """Ask for the end."""
        self._typed.put(console_pb2.OpenConsoleRequest(close=console_pb2.ConsoleClose()))

    def until(self, holds: Callable[[], Any], what: str) -> None:
        """Wait until what was told makes something hold."""
        with self._news:
            assert self._news.wait_for(holds, 10), f"{what}: {self.text!r} {self.closed}"

    def close(self) -> None:
        """End the call."""
        self._typed.put(None)
        if self.closed is None:
            self.leave()
        self._reader.join(10)
        assert not self._reader.is_alive()


@contextmanager
def console(fleet: Fleet, name: str, **fields: Any) -> Iterator[Console]:
    """Be at a console for the length of a `with` block."""
    found = Console(fleet, name, **fields)
    try:
        yield found
    finally:
        found.leave()
        found.until(lambda: found.closed, "the end of the console")
        found.close()


def log(fleet: Fleet, name: str, **fields: Any) -> tuple[console_pb2.ConsoleOpened, bytes, Any]:
    """Read the history of a console to its end."""
    fields.setdefault("device_id", "tty")
    opened, text, closed = console_pb2.ConsoleOpened(), b"", None
    for answer in fleet.consoles.ReadConsoleLog(console_pb2.ReadConsoleLogRequest(name=name, **fields), timeout=10):
        event = answer.WhichOneof("event")
        if event == "opened":
            opened = answer.opened
        elif event == "data":
            text += answer.data.data
        elif event == "closed":
            closed = answer.closed
    return opened, text, closed


# Consoles.


def test_what_is_typed_comes_back(fleet: Fleet, guest: domain_pb2.Domain) -> None:
    with console(fleet, guest.name) as here:
        assert here.opened.writable
        assert here.opened.epoch
        here.resize()
        sent = b"".join(b"line %d\n" % number for number in range(50))
        for number in range(50):
            here.type(b"line %d\n" % number)
        here.until(lambda: here.text == sent, "the echo")
    assert here.closed is not None
    assert here.closed.reason == console_pb2.CONSOLE_CLOSE_REASON_CALLER
    opened, text, closed = log(fleet, guest.name)
    assert opened.epoch == here.opened.epoch
    assert text.endswith(sent)
    assert closed.reason == console_pb2.CONSOLE_CLOSE_REASON_END_OF_LOG


def test_an_offset_goes_on_where_the_last_call_ended(fleet: Fleet, guest: domain_pb2.Domain) -> None:
    with console(fleet, guest.name) as first:
        first.type(b"one\n")
        first.until(lambda: first.text == b"one\n", "the echo")
        place = first.end
        first.type(b"two\n")
        first.until(lambda: first.text == b"one\ntwo\n", "the echo")
    with console(fleet, guest.name, offset=place, epoch=first.opened.epoch) as second:
        second.until(lambda: second.text == b"two\n", "what came after")
    _, text, _ = log(fleet, guest.name, offset=place)
    assert text == b"two\n"
    error = refused(lambda: log(fleet, guest.name, offset=1 << 40))
    assert (error.code().name, error.reason) == ("OUT_OF_RANGE", "RANGE_BEYOND_END"), error


def test_one_writes_and_many_read(fleet: Fleet, guest: domain_pb2.Domain) -> None:
    with console(fleet, guest.name) as writer:
        error = refused(lambda: Console(fleet, guest.name))
        assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE"), error
        with (
            console(fleet, guest.name, mode=console_pb2.CONSOLE_MODE_READ_ONLY) as one,
            console(fleet, guest.name, mode=console_pb2.CONSOLE_MODE_READ_ONLY) as other,
        ):
            assert not one.opened.writable
            writer.type(b"hello\n")
            for reader in (one, other):
                reader.until(lambda reader=reader: reader.text == b"hello\n", "what the writer typed")  # type: ignore[misc]  # binds the round's own
        with console(fleet, guest.name, force=True) as robber:
            writer.until(lambda: writer.closed, "the takeover")
            assert writer.closed is not None
            assert writer.closed.reason == console_pb2.CONSOLE_CLOSE_REASON_TAKEN_OVER
            robber.type(b"mine\n")
            robber.until(lambda: robber.text == b"mine\n", "the echo")


def test_a_console_ends_with_its_guest(fleet: Fleet, guest: domain_pb2.Domain) -> None:
    here = Console(fleet, guest.name)
    here.type(b"poweroff\n")
    here.until(lambda: here.closed, "the end of the guest")
    assert here.closed is not None
    assert here.closed.reason == console_pb2.CONSOLE_CLOSE_REASON_GUEST_ENDED
    here.close()
    until(lambda: get(fleet, guest.name).status.state == SHUT_OFF, 5, "the guest is seen to have ended")
    assert get(fleet, guest.name).status.state_reason == domain_pb2.DOMAIN_STATE_REASON_GUEST_SHUTDOWN
    error = refused(lambda: Console(fleet, guest.name))
    assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error


def test_a_port_that_is_not_there(fleet: Fleet, nodes: list[str], guest: domain_pb2.Domain) -> None:
    error = refused(lambda: Console(fleet, guest.name, device_id="other"))
    assert (error.code().name, error.reason) == ("NOT_FOUND", "DEVICE_NOT_FOUND"), error
    with domain(fleet, nodes[0], start="running") as bare:
        error = refused(lambda: Console(fleet, bare.name, device_id=""))
        assert error.reason == "DEVICE_NOT_FOUND", error
    error = refused(lambda: Console(fleet, f"{nodes[0]}/domains/none"))
    assert error.reason == "RESOURCE_NOT_FOUND", error


def test_the_first_message_of_a_console_says_which(fleet: Fleet, guest: domain_pb2.Domain) -> None:
    error = refused(lambda: next(fleet.consoles.OpenConsole(iter([console_pb2.OpenConsoleRequest(data=b"x")]))))
    assert (error.code().name, error.reason) == ("INVALID_ARGUMENT", "FIELD_REQUIRED"), error
    first = console_pb2.OpenConsoleRequest(name=guest.name, data=b"x")
    error = refused(lambda: next(fleet.consoles.OpenConsole(iter([first]))))
    assert (error.reason, error.fields) == ("FIELD_REQUIRED", ("open",)), error


# Counters.


def test_counters_of_one_domain(fleet: Fleet, nodes: list[str]) -> None:
    spec = small_spec()
    spec.cpu.vcpu_count = 2
    spec.interfaces["lan"].SetInParent()
    with domain(fleet, nodes[0], spec=spec, start="running") as made:
        request = stats_pb2.GetDomainStatsRequest(name=made.name)
        first = fleet.stats.GetDomainStats(request)
        assert (first.name, first.uid, first.runtime_id) == (made.name, made.uid, made.status.runtime_id)
        assert first.state.state == RUNNING
        assert len(first.vcpus) == 2
        assert first.balloon.maximum_bytes == 64 * MIB
        assert [one.device_id for one in first.interfaces] == ["lan"]
        time.sleep(0.05)
        second = fleet.stats.GetDomainStats(request)
        assert second.observe_time.ToNanoseconds() > first.observe_time.ToNanoseconds()
        assert second.cpu.total_time.ToNanoseconds() >= first.cpu.total_time.ToNanoseconds()
        request.groups.append(stats_pb2.STATS_GROUP_STATE)
        only = fleet.stats.GetDomainStats(request)
        assert only.HasField("state")
        assert not only.HasField("cpu")
        assert not only.interfaces
        verb(fleet, "StopDomain", made.name, mode=domain_pb2.STOP_MODE_FORCE)
        stopped = fleet.stats.GetDomainStats(stats_pb2.GetDomainStatsRequest(name=made.name))
        assert stopped.state.state == SHUT_OFF


def test_counters_of_the_fleet(fleet: Fleet, nodes: list[str]) -> None:
    label = unique("group")
    with (
        domain(fleet, nodes[0], start="running", labels={"group": label}) as one,
        domain(fleet, nodes[1], start="running", labels={"group": label}) as two,
        domain(fleet, nodes[1], labels={"group": label}) as three,
    ):
        names = sorted(made.name for made in (one, two, three))
        request = stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", filter=f'labels.group="{label}"')
        answer = fleet.stats.BatchGetDomainStats(request)
        assert sorted(found.name for found in answer.stats) == names
        assert not answer.unreachable
        assert {found.node for found in answer.freshness} == set(nodes)
        paged = stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", filter=f'labels.group="{label}"', page_size=2)
        assert sorted(found.name for found in fleet.pages(fleet.stats.BatchGetDomainStats, paged)) == names
        named = stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", names=[two.name, one.name])
        found = {one.name: one for one in fleet.stats.BatchGetDomainStats(named).stats}
        assert set(found) == {one.name, two.name}
        assert found[two.name].runtime_id == two.status.runtime_id
        anywhere = fleet.stats.GetDomainStats(stats_pb2.GetDomainStatsRequest(name=f"nodes/-/domains/{two.uid}"))
        assert (anywhere.name, anywhere.runtime_id) == (two.name, two.status.runtime_id)
        asked = stats_pb2.StreamDomainStatsRequest(parent="nodes/-", filter=request.filter)
        stream = fleet.stats.StreamDomainStats(asked, timeout=30)
        first = []
        for message in stream:
            first.append(message)
            if message.round_end:
                break
        stream.cancel()
        assert sorted(seen.name for message in first for seen in message.stats) == names
        assert {message.round_number for message in first} == {1}
        assert not any(message.unreachable for message in first)


def test_counters_as_a_stream(fleet: Fleet, nodes: list[str]) -> None:
    with domain(fleet, nodes[0], start="running") as made:
        request = stats_pb2.StreamDomainStatsRequest(
            parent=nodes[0], names=[made.name], interval=duration_pb2.Duration(nanos=200_000_000)
        )
        stream = fleet.stats.StreamDomainStats(request, timeout=10)
        rounds, times = [], []
        for answer in stream:
            assert [found.name for found in answer.stats] == [made.name]
            times.append(answer.stats[0].observe_time.ToNanoseconds())
            if answer.round_end:
                rounds.append(answer.round_number)
            if len(rounds) == 4:
                break
        stream.cancel()
        assert rounds == list(range(rounds[0], rounds[0] + 4))
        assert all(0.1e9 < later - earlier < 1e9 for earlier, later in pairwise(times))
    error = refused(
        lambda: next(
            fleet.stats.StreamDomainStats(
                stats_pb2.StreamDomainStatsRequest(parent=nodes[0], interval=duration_pb2.Duration(nanos=1))
            )
        )
    )
    assert (error.reason, error.fields) == ("FIELD_OUT_OF_RANGE", ("interval",)), error


# What a node says of itself.


def test_the_host(fleet: Fleet, nodes: list[str]) -> None:
    host = fleet.hosts.GetHost(host_pb2.GetHostRequest(name=f"{nodes[0]}/host"))
    assert host.status.kernel_release
    assert host.status.boot_id
    assert host.status.cpu.online_count > 0
    assert host.status.memory_total_bytes > 256 * MIB
    assert {layer.name for layer in host.status.isolation_layers}
    assert all(layer.enabled or layer.reason for layer in host.status.isolation_layers), "why one is not on"
    assert {accelerator.name for accelerator in host.status.accelerators} >= {"tcg"}
    assert all(one.usable or one.reason for one in host.status.accelerators)
    counted = fleet.stats.GetHostStats(stats_pb2.GetHostStatsRequest(name=f"{nodes[0]}/host"))
    assert counted.memory_total_bytes == host.status.memory_total_bytes
    assert counted.uptime.seconds > 0
    assert counted.idle_time.seconds > 0


def test_the_drivers(fleet: Fleet, nodes: list[str]) -> None:
    answer = fleet.capabilities.ListDrivers(capability_pb2.ListDriversRequest(parent=nodes[0]))
    drivers = {found.name.rpartition("/")[2]: found for found in answer.drivers}
    assert set(drivers) == {"test", "qemu"}
    assert [name for name, found in drivers.items() if found.status.default] == ["test"]
    for found in drivers.values():
        assert found.status.state == capability_pb2.DRIVER_STATE_READY, found.status.init_error
        assert found.status.version
        assert found.status.capabilities
        assert fleet.capabilities.GetDriver(capability_pb2.GetDriverRequest(name=found.name)) == found
    error = refused(
        lambda: fleet.capabilities.GetDriver(capability_pb2.GetDriverRequest(name=f"{nodes[0]}/drivers/none"))
    )
    assert error.reason == "RESOURCE_NOT_FOUND"


def test_addresses_of_a_guest_without_any(fleet: Fleet, guest: domain_pb2.Domain) -> None:
    request = guest_agent_pb2.ListGuestAddressesRequest(name=guest.name, sources=[domain_pb2.ADDRESS_SOURCE_LEASE])
    answer = fleet.guest_agents.ListGuestAddresses(request)
    assert not answer.addresses
    assert not answer.missing_sources, "the network service has been asked"
    request = guest_agent_pb2.ListGuestAddressesRequest(name=guest.name, sources=[domain_pb2.ADDRESS_SOURCE_AGENT])
    answer = fleet.guest_agents.ListGuestAddresses(request)
    assert list(answer.missing_sources) == [domain_pb2.ADDRESS_SOURCE_AGENT]


@pytest.mark.parametrize("service", ["compute", "storage", "network"])
def test_the_servers(fleet: Fleet, nodes: list[str], service: str) -> None:
    name = f"{nodes[0]}/services/{service}"
    server = fleet.servers.GetServer(admin_pb2.GetServerRequest(name=name))
    assert server.name == name
    assert server.version
    assert server.store_id
    assert server.pid
    assert server.identity.endswith(f"/node/{nodes[0].removeprefix('nodes/')}/{service}")
    assert server.certificate_expire_time.ToSeconds() > time.time()
    again = fleet.servers.ReloadCertificates(admin_pb2.ReloadCertificatesRequest(name=name))
    assert (again.pid, again.start_time) == (server.pid, server.start_time)
    me = fleet.access.WhoAmI(admin_pb2.WhoAmIRequest(name=name))
    assert me.subject.endswith("/user/admin")
    assert list(me.roles) == ["admin"]
    assert "/gateway/" in me.via
