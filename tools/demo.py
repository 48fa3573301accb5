"""The main job, from nothing to a guest and back to nothing: `make demo`.

An example to read: everything that a controller does to run a guest stands in `run_guest`, in order, with the Python
client.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import empty_pb2

from tools import fleet as development
from tools import guest_image, unprivileged
from virtfleet.compute.v1 import console_pb2, domain_pb2, guest_agent_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet.type.v1 import operation_pb2
from virtfleet_client import Credentials, Fleet, connect, errors
from virtfleet_client.transfer import upload

MIB = 1 << 20


class Steps:
    """Prints one line a step, with the time since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print a step that is done."""
        print(f"{time.monotonic() - self._began:6.2f} s  {text}", flush=True)

    def progress(self, what: str) -> Callable[[operation_pb2.OperationMetadata], None]:
        """Return what prints the phases of an operation as it goes through them."""
        said: set[str] = set()

        def show(metadata: operation_pb2.OperationMetadata) -> None:
            if metadata.phase and metadata.phase not in said:
                said.add(metadata.phase)
                self(f"    {what}: {metadata.phase} ({metadata.progress_ratio:.0%})")

        return show


class Console:
    """Reads a guest's console through the gateway as lines, and types into it."""

    def __init__(self, fleet: Fleet, domain: str, device_id: str) -> None:
        self._typed: list[console_pb2.OpenConsoleRequest] = []
        self._more = threading.Condition()
        self._ended = False
        self._opening = console_pb2.OpenConsoleRequest(name=domain)
        self._opening.open.device_id = device_id
        self._opening.open.offset = 0
        self._stream = fleet.consoles.OpenConsole(self._requests())
        self._text = ""

    def _requests(self) -> Iterator[console_pb2.OpenConsoleRequest]:
        yield self._opening
        while True:
            with self._more:
                self._more.wait_for(lambda: self._typed or self._ended)
                if not self._typed:
                    return
                message = self._typed.pop(0)
            yield message

    def type(self, text: str) -> None:
        """Send a line to the guest."""
        with self._more:
            self._typed.append(console_pb2.OpenConsoleRequest(data=f"{text}\n".encode()))
            self._more.notify()

    def line(self, pattern: str) -> re.Match[str]:
        """Read until a line matches.

        Raises:
            RuntimeError: The console ends before.
        """
        wanted = re.compile(pattern)
        while True:
            while "\n" in self._text:
                line, self._text = self._text.split("\n", 1)
                found = wanted.fullmatch(line.strip("\r "))
                if found:
                    return found
            event = next(self._stream, None)
            if event is None or event.HasField("closed"):
                raise RuntimeError("the console has ended before the guest said what was expected")
            if event.HasField("data"):
                self._text += event.data.data.decode(errors="replace")

    def close(self) -> None:
        """End the stream."""
        with self._more:
            self._ended = True
            self._more.notify()
        self._stream.cancel()


@contextmanager
def console_of(fleet: Fleet, domain: str, device_id: str) -> Iterator[Console]:
    """Open a console for the length of a `with` block."""
    console = Console(fleet, domain, device_id)
    try:
        yield console
    finally:
        console.close()


def run_guest(fleet: Fleet, node: str, nonce: str, restart_compute: Callable[[], int], say: Steps) -> None:
    """Make everything that a guest needs, run it, lose its service, find it again, and take all away.

    Raises:
        VirtfleetError: A call failed.
        RuntimeError: The guest did not do what it should.
    """
    parent = f"nodes/{node}"
    make_storage(fleet, parent, say)
    make_network(fleet, parent, say)
    guest = start_domain(fleet, parent, nonce, say)
    check_line(fleet, guest.name, nonce, say)
    lose_and_find(fleet, guest, restart_compute, say)
    stop = domain_pb2.StopDomainRequest(name=guest.name, mode=domain_pb2.STOP_MODE_GRACEFUL)
    fleet.wait(fleet.domains.StopDomain(stop), domain_pb2.Domain, progress=say.progress("stop"))
    say("guest stopped gracefully")
    delete_all(fleet, parent)
    say("domain, network, volumes and pool deleted")


def make_storage(fleet: Fleet, parent: str, say: Steps) -> None:
    """Make a pool, a disk, and volumes of kernel and initrd."""
    request = pool_pb2.CreatePoolRequest(parent=parent, pool_id="demo", start=True)
    request.pool.spec.dir.SetInParent()
    pool = fleet.wait(fleet.pools.CreatePool(request), pool_pb2.Pool, progress=say.progress("pool"))
    say(f"pool {pool.name} with {pool.status.available_bytes >> 30} GiB free")

    volume = volume_pb2.CreateVolumeRequest(parent=pool.name, volume_id="disk")
    volume.volume.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
    volume.volume.spec.capacity_bytes = 1 << 30
    fleet.wait(fleet.volumes.CreateVolume(volume), volume_pb2.Volume, progress=say.progress("disk"))
    say("volume disk: qcow2, 1 GiB")

    image = guest_image.make()
    for volume_id, path in (("kernel", image.kernel), ("initrd", image.initrd)):
        volume = volume_pb2.CreateVolumeRequest(parent=pool.name, volume_id=volume_id)
        volume.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
        volume.volume.spec.capacity_bytes = path.stat().st_size
        fleet.wait(fleet.volumes.CreateVolume(volume), volume_pb2.Volume)
        uploaded = upload(fleet, f"{pool.name}/volumes/{volume_id}", path)
        say(f"volume {volume_id}: {path.stat().st_size / MIB:.1f} MiB uploaded, {uploaded.status.digest[:23]}…")


def make_network(fleet: Fleet, parent: str, say: Steps) -> None:
    """Make a network with NAT, DHCP and DNS."""
    request = network_pb2.CreateNetworkRequest(parent=parent, network_id="demo", start=True)
    spec = request.network.spec
    spec.nat.SetInParent()
    spec.domain_name = "demo.test"
    spec.subnets["lan"].prefix = "192.168.177.0/24"
    spec.subnets["lan"].dhcp.ranges.add(first="192.168.177.10", last="192.168.177.200")
    spec.dns.enabled = True
    network = fleet.wait(fleet.networks.CreateNetwork(request), network_pb2.Network, progress=say.progress("network"))
    say(f"{network.name} on {network.status.bridge_name}: NAT, DHCP and DNS")


def start_domain(fleet: Fleet, parent: str, nonce: str, say: Steps) -> domain_pb2.Domain:
    """Define and start a domain with one disk, one interface and a serial console."""
    request = domain_pb2.CreateDomainRequest(parent=parent, domain_id="demo")
    request.start.SetInParent()
    spec = request.domain.spec
    spec.driver = "qemu"
    spec.os.kernel.kernel_volume = "pools/demo/volumes/kernel"
    spec.os.kernel.initrd_volume = "pools/demo/volumes/initrd"
    spec.os.kernel.command_line = guest_image.command_line(nonce)
    spec.cpu.vcpu_count = 1
    spec.memory.maximum_bytes = 192 * MIB
    spec.disks["root"].volume = "pools/demo/volumes/disk"
    spec.interfaces["lan"].network = "networks/demo"
    spec.serials["tty"].SetInParent()
    guest = fleet.wait(fleet.domains.CreateDomain(request), domain_pb2.Domain, progress=say.progress("domain"))
    say(f"{guest.name} runs as process {guest.status.pid}, user {guest.status.run_as_uid}")
    return guest


def check_line(fleet: Fleet, domain: str, nonce: str, say: Steps) -> None:
    """Read the guest's line from its console and its lease from the API, and hold them against each other."""
    with console_of(fleet, domain, "tty") as console:
        digest = console.line(r"VIRTFLEET ([0-9a-f]{64})").group(1)
    say(f"the guest's line, read through the gateway: {digest}")
    request = guest_agent_pb2.ListGuestAddressesRequest(name=domain, sources=[domain_pb2.ADDRESS_SOURCE_LEASE])
    lease = fleet.guest_agents.ListGuestAddresses(request).addresses[0]
    say(f"lease: {lease.mac_address} has {lease.address}")
    text = f"{nonce} {lease.mac_address} {lease.address}"
    if digest != hashlib.sha256(text.encode()).hexdigest():
        raise RuntimeError(f"the guest's line is not the sha256 of {text!r}")
    say(f"that line is the sha256 of {text!r}")


def lose_and_find(fleet: Fleet, guest: domain_pb2.Domain, restart_compute: Callable[[], int], say: Steps) -> None:
    """Kill the compute service and show that the same guest is found by the next one."""
    with console_of(fleet, guest.name, "tty") as console:
        console.type("uptime")
        before = float(console.line(r"UPTIME ([0-9.]+)").group(1))
    say(f"compute service, process {restart_compute()}, killed with SIGKILL")
    found = _wait_for_guest(fleet, guest.name)
    if found.status.pid != guest.status.pid:
        raise RuntimeError(f"process {guest.status.pid} became {found.status.pid}")
    with console_of(fleet, guest.name, "tty") as console:
        console.type("uptime")
        after = before
        while after <= before:  # the log begins with the answer of the first time
            after = float(console.line(r"UPTIME ([0-9.]+)").group(1))
    say(f"found again: process {found.status.pid}, its uptime went on from {before:.2f} to {after:.2f} s")


def _wait_for_guest(fleet: Fleet, domain: str) -> domain_pb2.Domain:
    """Wait until the service that was killed answers again and has found the guest."""
    ends_at = time.monotonic() + 30
    while time.monotonic() < ends_at:
        try:
            found: domain_pb2.Domain = fleet.domains.GetDomain(domain_pb2.GetDomainRequest(name=domain), timeout=5)
        except (errors.Unavailable, errors.DeadlineExceeded):
            time.sleep(0.2)
            continue
        if found.status.state == domain_pb2.DOMAIN_STATE_RUNNING:
            return found
        time.sleep(0.1)
    raise RuntimeError(f"{domain} is not found again within 30 s")


def delete_all(fleet: Fleet, parent: str) -> None:
    """Delete what the functions above have made, in reverse."""
    domain, network, pool = f"{parent}/domains/demo", f"{parent}/networks/demo", f"{parent}/pools/demo"
    fleet.wait(fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=domain)), empty_pb2.Empty)
    fleet.wait(fleet.networks.StopNetwork(network_pb2.StopNetworkRequest(name=network)), network_pb2.Network)
    fleet.wait(fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=network)), empty_pb2.Empty)
    for volume in list(fleet.pages(fleet.volumes.ListVolumes, volume_pb2.ListVolumesRequest(parent=pool))):
        fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=volume.name)), empty_pb2.Empty)
    fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=pool)), pool_pb2.Pool)
    fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=pool)), empty_pb2.Empty)


def show_test_fleet(fleet: Fleet, say: Steps) -> None:
    """Show nodes with the in-memory driver: a domain on each, listed and counted through the one address."""
    nodes = list(fleet.pages(fleet.nodes.ListNodes, node_pb2.ListNodesRequest()))
    for node in nodes:
        create = domain_pb2.CreateDomainRequest(parent=node.name, domain_id="demo")
        create.start.SetInParent()
        create.domain.spec.memory.maximum_bytes = 64 * MIB
        made = fleet.wait(fleet.domains.CreateDomain(create), domain_pb2.Domain)
        say(f"{made.name}: {domain_pb2.DomainState.Name(made.status.state)}")
    ends_at = time.monotonic() + 10
    while time.monotonic() < ends_at:
        listed = list(fleet.pages(fleet.domains.ListDomains, domain_pb2.ListDomainsRequest(parent="nodes/-")))
        if len(listed) == len(nodes):
            break
        time.sleep(0.05)
    say(f"the fleet lists {len(listed)} domains: {', '.join(domain.name for domain in listed)}")
    for domain in listed:
        force = domain_pb2.StopDomainRequest(name=domain.name, mode=domain_pb2.STOP_MODE_FORCE)
        fleet.wait(fleet.domains.StopDomain(force), domain_pb2.Domain)
    say("all stopped")


async def demo(nodes: int, driver: str, nonce: str) -> int:
    """Run the demo; returns the exit code."""
    say = Steps()
    plan = development.Plan(nodes=nodes, driver=driver)
    with tempfile.TemporaryDirectory(prefix="virtfleet-demo-") as folder:
        async with development.Fleet.running(plan, run_folder=Path(folder), say=say) as fleet:
            loop = asyncio.get_running_loop()
            files = fleet.credentials
            credentials = Credentials(files["ca"], files["certificate"], files["key"])

            def restart_compute() -> int:
                return asyncio.run_coroutine_threadsafe(_kill(fleet), loop).result(10)

            def work() -> None:
                with connect(f"tls://{fleet.address}", credentials) as connection:
                    if driver == "test":
                        show_test_fleet(connection, say)
                    else:
                        run_guest(connection, fleet.nodes[0], nonce, restart_compute, say)

            await asyncio.to_thread(work)
    left = fleet.leftovers()
    say(left.counts())
    for kind in ("processes", "links", "namespaces", "mounts", "cgroups", "files"):
        for name in getattr(left, kind):
            print(f"          {kind}: {name}")
    return 1 if left else 0


async def _kill(fleet: development.Fleet) -> int:
    return fleet.supervisor.kill(f"{fleet.nodes[0]}/compute")


def main() -> int:
    """Read the environment (`NODES`, `DRIVER`, `NONCE`) and run the demo; returns the exit code."""
    driver = os.environ.get("DRIVER") or "qemu"
    unprivileged.enter(needs_tap=driver == "qemu")
    nonce = os.environ.get("NONCE") or secrets.token_hex(8)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", nonce):
        print("demo: NONCE must be 1 to 64 characters of A-Z a-z 0-9 . _ -", file=sys.stderr)
        return 2
    nodes = os.environ.get("NODES") or "1"
    if not re.fullmatch(r"[1-9][0-9]?", nodes) or driver not in ("qemu", "test"):
        print("demo: NODES must be 1 to 99 and DRIVER qemu or test", file=sys.stderr)
        return 2
    try:
        return asyncio.run(demo(int(nodes), driver, nonce))
    except (RuntimeError, guest_image.GuestImageError, errors.VirtfleetError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
