"""A node for a test.

A network namespace with a real launcher and a real network service, guests and an outside world beside it.

Truth is read from outside: `ip -j`, `nft -j`, /proc, files.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from virtfleet.network.v1 import network_pb2, network_pb2_grpc, port_pb2, port_pb2_grpc, watch_pb2, watch_pb2_grpc
from virtfleet.node.v1 import plug_pb2, plug_pb2_grpc
from virtfleet_service.call import CALLER_KEY, Caller
from virtfleet_service.identity import encode_caller

ROOT = Path(__file__).parents[3]
LAUNCHER = ROOT / "services" / "launcher" / "virtfleet_launcher" / "__main__.py"
DNSMASQ = "/usr/sbin/dnsmasq"
DNSMASQ_UID = 29999
NODE = "nodes/n1"
DEADLINE_SECONDS = 20.0

T = TypeVar("T", bound=Message)


class Refusal(Exception):
    """An error as a client sees it."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.message = status.message
        self.code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        info = error_details_pb2.ErrorInfo()
        for detail in status.details:
            detail.Unpack(info)
        self.reason = info.reason
        self.metadata = dict(info.metadata)
        self.field = self.metadata.get("field", "")


@contextlib.contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        trailers: Any = error.trailing_metadata() or ()
        for key, value in trailers:
            if key == "grpc-status-details-bin":
                raise Refusal(status_pb2.Status.FromString(value)) from None
        raise


def run(*argv: str, check: bool = True, timeout: float = 20.0) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stdout} {done.stderr}")
    return done.stdout


_DHCP6 = """
import ipaddress, os, socket, struct, sys, time
mac = bytes.fromhex(sys.argv[1].replace(":", ""))
index = socket.if_nametoindex("eth0")
def option(kind, data):
    return struct.pack("!HH", kind, len(data)) + data
question = b"\\1" + os.urandom(3) + option(1, struct.pack("!HH", 3, 1) + mac)
question += option(3, struct.pack("!III", 7, 0, 0)) + option(8, bytes(2)) + option(14, b"")
line = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
line.settimeout(1)
line.bind(("::", 546))
for _ in range(20):
    try:
        # Not before the guest's own address has been found to be nobody else's.
        line.sendto(question, ("ff02::1:2", 547, 0, index))
        answer = line.recv(4096)
    except OSError:
        time.sleep(0.2)
        continue
    at = answer.find(struct.pack("!HH", 5, 24))
    if answer[:4] == b"\\7" + question[1:4] and at >= 0:
        print(ipaddress.ip_address(answer[at + 4 : at + 20]))
        sys.exit()
sys.exit("no answer")
"""


class Namespace:
    """A network namespace, removed with all that is in it."""

    def __init__(self, what: str) -> None:
        self.name = f"vf-{what}-{os.getpid()}-{secrets.token_hex(3)}"
        self.prefix: tuple[str, ...] = ("ip", "netns", "exec", self.name)
        run("ip", "netns", "add", self.name)
        self("ip", "link", "set", "lo", "up")

    def __call__(self, *argv: str, check: bool = True, timeout: float = 20.0) -> str:
        return run(*self.prefix, *argv, check=check, timeout=timeout)

    def succeeds(self, *argv: str) -> bool:
        return subprocess.run([*self.prefix, *argv], capture_output=True, check=False, timeout=20).returncode == 0

    def json(self, *argv: str) -> Any:
        text = self(*argv)
        return json.loads(text) if text.strip() else []

    def links(self) -> dict[str, dict[str, Any]]:
        return {link["ifname"]: link for link in self.json("ip", "-j", "-d", "link", "show")}

    def addresses(self, link: str) -> set[str]:
        found = self.json("ip", "-j", "address", "show", "dev", link)
        return {f"{item['local']}/{item['prefixlen']}" for item in found[0]["addr_info"] if item["scope"] == "global"}

    def tables(self) -> set[str]:
        items = self.json("nft", "-j", "list", "tables")["nftables"]
        return {f"{item['table']['family']} {item['table']['name']}" for item in items if "table" in item}

    def remove(self) -> None:
        run("ip", "netns", "del", self.name, check=False)


class Guest:
    """A namespace that stands for a guest: one end of a veth pair whose other end is on a bridge of the node."""

    def __init__(self, node: Node, bridge: str, mac_address: str = "") -> None:
        self.namespace = Namespace("guest")
        self.folder = node.folder / self.namespace.name
        self.folder.mkdir()
        self.link = f"g{secrets.token_hex(4)}"
        more = ["address", mac_address] if mac_address else []
        self.namespace("ip", "link", "add", "eth0", *more, "type", "veth", "peer", "name", self.link)
        # Moved by the process that holds the node's namespace, which need not have a name.
        self.namespace("ip", "link", "set", self.link, "netns", str(node.processes["service"].pid))
        node.namespace("ip", "link", "set", self.link, "master", bridge, "up")
        self.namespace("ip", "link", "set", "eth0", "up")
        script = self.folder / "script"
        script.write_text(
            "#!/bin/sh\n"
            'if [ "$1" = bound ] || [ "$1" = renew ]; then\n'
            f"  env > {self.folder}/lease\n"
            '  ip address replace "$ip/$mask" dev "$interface"\n'
            '  [ -z "$router" ] || ip route replace default via "${router%% *}"\n'
            "fi\n"
        )
        script.chmod(0o755)

    def dhcp(self, *options: str) -> dict[str, str]:
        """Get a lease, and return what the server said."""
        self.namespace(
            "busybox",
            "udhcpc",
            "-i",
            "eth0",
            "-f",
            "-n",
            "-q",
            "-t",
            "5",
            "-T",
            "1",
            *options,
            "-s",
            f"{self.folder}/script",
        )
        lines = (self.folder / "lease").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def dhcp6(self) -> str:
        """Get an IPv6 lease, by one question and one answer (rapid commit), and return its address."""
        client = self.folder / "dhcp6.py"
        client.write_text(_DHCP6)
        return self.namespace(sys.executable, str(client), self.mac_address, timeout=40).strip()

    def release(self) -> None:
        """Get the lease again, hold it for a moment, and give it back."""
        client = ("busybox", "udhcpc", "-i", "eth0", "-f", "-n", "-R", "-s", f"{self.folder}/script")
        self.namespace("timeout", "-s", "TERM", "1", *client, check=False)

    def static(self, address: str, router: str) -> None:
        self.namespace("ip", "address", "add", address, "dev", "eth0")
        self.namespace("ip", "route", "add", "default", "via", router)

    def lookup(self, name: str, server: str) -> str:
        return self.namespace("busybox", "nslookup", name, server, check=False)

    def pings(self, address: str) -> bool:
        return self.namespace.succeeds("busybox", "ping", "-c", "1", "-W", "2", address)

    @property
    def mac_address(self) -> str:
        mac: str = self.namespace.links()["eth0"]["address"]
        return mac


class Node:
    """The node: its namespace, its launcher, its network service."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vf-network-", dir="/tmp"))
        # Of tests; dnsmasq runs as another user and must reach its own files.
        self.folder.chmod(0o755)
        self.namespace = Namespace("node")
        self.settings: dict[str, object] = {
            "node": "n1",
            "state_dir": str(self.folder / "state"),
            "run_dir": str(self.folder / "run"),
            "repair_seconds": 2.0,
        }
        self.prefix = list(self.namespace.prefix)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.extra: list[Namespace] = []
        self.channels: list[grpc.Channel] = []

    # Processes.

    def start_launcher(self, *flags: str) -> None:
        flags = flags or tuple(
            f"--ambient-capability={DNSMASQ}={name}" for name in ("net_admin", "net_raw", "net_bind_service")
        )
        program = ["/usr/bin/python3", "-I", "-S", str(LAUNCHER)]
        self._spawn(
            "launcher",
            [*program, "--run-dir", f"{self.folder}/run/launcher", "--executable", DNSMASQ, *flags],
        )

    def start_service(self, *, failpoint: str = "") -> None:
        file = self.folder / "settings.toml"
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in self.settings.items()))
        environment = {**os.environ, "VIRTFLEET_FAILPOINT": failpoint}
        self._spawn("service", [sys.executable, "-m", "virtfleet_network", "--settings", str(file)], environment)
        self.connect()

    def _spawn(self, name: str, argv: list[str], environment: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self.prefix, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/"
            )

    def connect(self) -> None:
        # A connection of its own to each service that comes: one to a dead one waits before it looks again.
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 50),
        ]
        self.channel = grpc.insecure_channel(f"unix:{self.folder}/run/network/admin.sock", options)
        self.peer_channel = grpc.insecure_channel(f"unix:{self.folder}/run/network/peer.sock", options)
        self.channels += [self.channel, self.peer_channel]
        self.networks = network_pb2_grpc.NetworkServiceStub(self.channel)
        self.ports = port_pb2_grpc.PortServiceStub(self.channel)
        self.watches = watch_pb2_grpc.WatchServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)  # type: ignore[no-untyped-call]  # googleapis has no types
        self.plugs = plug_pb2_grpc.PlugServiceStub(self.peer_channel)
        with contextlib.suppress(grpc.FutureTimeoutError):
            # The last of the sockets: with it all are there.
            grpc.channel_ready_future(self.peer_channel).result(10)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(20)

    def died(self) -> None:
        """Wait until the service has died at its failpoint."""
        assert self.processes["service"].wait(20) == -signal.SIGKILL
        del self.processes["service"]

    def dnsmasq(self, network_uid: str) -> int:
        """Return the process of dnsmasq of a network; 0: none."""
        wanted = f"--conf-file={self.folder}/state/dnsmasq/{network_uid}/dnsmasq.conf"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if wanted in path.read_text().split("\0"):
                    return int(path.parent.name)
        return 0

    def all_dnsmasq(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_text().split("\0")
                if any(word.startswith(f"--conf-file={self.folder}/") for word in words):
                    found.append(int(path.parent.name))
        return found

    def log(self, name: str = "service") -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for name in ("service", "launcher"):
            if name in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.end(name)
        for pid in self.all_dnsmasq():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for namespace in [*self.extra, self.namespace]:
            namespace.remove()
        shutil.rmtree(self.folder)

    # What stands around it.

    def guest(self, bridge: str, mac_address: str = "") -> Guest:
        guest = Guest(self, bridge, mac_address)
        self.extra.append(guest.namespace)
        return guest

    def outside(self) -> Namespace:
        """Make a world outside: 198.51.100.2 behind 198.51.100.1 of the node; it knows no way to any guest."""
        outside = Namespace("outside")
        self.extra.append(outside)
        self.namespace("ip", "link", "add", "wan0", "type", "veth", "peer", "name", "wan1", "netns", outside.name)
        self.namespace("ip", "address", "add", "198.51.100.1/24", "dev", "wan0")
        self.namespace("ip", "link", "set", "wan0", "up")
        outside("ip", "address", "add", "198.51.100.2/24", "dev", "wan1")
        outside("ip", "link", "set", "wan1", "up")
        return outside

    # Calls.

    def done(self, operation: operations_pb2.Operation, of: type[T]) -> T:
        """Return the response of an operation when it has ended.

        Raises:
            Refusal: It has failed.
        """
        if not operation.done:
            request = operations_pb2.WaitOperationRequest(name=operation.name)
            request.timeout.FromSeconds(20)
            operation = self.operations.WaitOperation(request, timeout=30)
        assert operation.done
        if operation.HasField("error"):
            raise Refusal(operation.error)
        found = of()
        assert operation.response.Unpack(found)
        return found

    def create(
        self, network_id: str, spec: network_pb2.NetworkSpec, *, start: bool = True, **fields: Any
    ) -> network_pb2.Network:
        request = network_pb2.CreateNetworkRequest(parent=NODE, network_id=network_id, start=start, **fields)
        request.network.spec.CopyFrom(spec)
        with translated():
            return self.done(self.networks.CreateNetwork(request, timeout=DEADLINE_SECONDS), network_pb2.Network)

    def get(self, network_id: str) -> network_pb2.Network:
        request = network_pb2.GetNetworkRequest(name=f"{NODE}/networks/{network_id}")
        with translated():
            found: network_pb2.Network = self.networks.GetNetwork(request, timeout=DEADLINE_SECONDS)
        return found

    def start(self, network_id: str) -> network_pb2.Network:
        request = network_pb2.StartNetworkRequest(name=f"{NODE}/networks/{network_id}")
        with translated():
            return self.done(self.networks.StartNetwork(request, timeout=DEADLINE_SECONDS), network_pb2.Network)

    def stop(self, network_id: str, *, force: bool = False) -> network_pb2.Network:
        request = network_pb2.StopNetworkRequest(name=f"{NODE}/networks/{network_id}", force=force)
        with translated():
            return self.done(self.networks.StopNetwork(request, timeout=DEADLINE_SECONDS), network_pb2.Network)

    def delete(self, network_id: str, *, force: bool = False) -> None:
        from google.protobuf import empty_pb2

        request = network_pb2.DeleteNetworkRequest(name=f"{NODE}/networks/{network_id}", force=force)
        with translated():
            self.done(self.networks.DeleteNetwork(request, timeout=DEADLINE_SECONDS), empty_pb2.Empty)

    def update(self, network: network_pb2.Network, *paths: str, **fields: Any) -> network_pb2.Network:
        request = network_pb2.UpdateNetworkRequest(network=network, **fields)
        request.update_mask.paths.extend(paths)
        with translated():
            operation = self.networks.UpdateNetwork(request, timeout=DEADLINE_SECONDS)
            return self.done(operation, network_pb2.Network)

    def create_port(self, network_id: str, port_id: str, **spec: Any) -> port_pb2.Port:
        request = port_pb2.CreatePortRequest(parent=f"{NODE}/networks/{network_id}", port_id=port_id)
        request.port.spec.CopyFrom(port_pb2.PortSpec(**spec))
        with translated():
            return self.done(self.ports.CreatePort(request, timeout=DEADLINE_SECONDS), port_pb2.Port)

    def get_port(self, name: str) -> port_pb2.Port:
        with translated():
            found: port_pb2.Port = self.ports.GetPort(port_pb2.GetPortRequest(name=name), timeout=DEADLINE_SECONDS)
        return found

    def peer(self, method: str, request: Message, *, roles: tuple[str, ...] = ("admin",)) -> Any:
        caller = Caller("spiffe://virtfleet.dev/user/test", roles)
        with translated():
            return getattr(self.plugs, method)(
                request, timeout=DEADLINE_SECONDS, metadata=((CALLER_KEY, encode_caller(caller)),)
            )

    def reserve(self, network_id: str, port_id: str, domain_uid: str, **fields: Any) -> plug_pb2.ReservePortResponse:
        request = plug_pb2.ReservePortRequest(
            parent=f"{NODE}/networks/{network_id}",
            port_id=port_id,
            domain_uid=domain_uid,
            domain=f"{NODE}/domains/d1",
            device_id="lan",
            **fields,
        )
        found: plug_pb2.ReservePortResponse = self.peer("ReservePort", request)
        return found

    def plug(self, name: str, domain_uid: str, run_as_uid: int = 20001) -> plug_pb2.PlugPortResponse:
        request = plug_pb2.PlugPortRequest(
            name=name, domain_uid=domain_uid, domain=f"{NODE}/domains/d1", device_id="lan", run_as_uid=run_as_uid
        )
        found: plug_pb2.PlugPortResponse = self.peer("PlugPort", request)
        return found

    def unplug(self, name: str, domain_uid: str) -> None:
        self.peer("UnplugPort", plug_pb2.UnplugPortRequest(name=name, domain_uid=domain_uid))

    def events(self) -> list[watch_pb2.Event]:
        return list(self.watches.ListEvents(watch_pb2.ListEventsRequest(parent=NODE), timeout=DEADLINE_SECONDS).events)

    def leases(self, network_id: str) -> list[network_pb2.Lease]:
        request = network_pb2.ListLeasesRequest(parent=f"{NODE}/networks/{network_id}")
        return list(self.networks.ListLeases(request, timeout=DEADLINE_SECONDS).leases)

    @contextlib.contextmanager
    def expecting(
        self, *kinds: watch_pb2.EventType.ValueType, seconds: float = 10.0
    ) -> Iterator[list[watch_pb2.Event]]:
        """Do something, and wait until events of all these kinds have come; they are in the list afterwards."""
        request = watch_pb2.WatchResourcesRequest(parent=NODE)
        request.snapshot.SetInParent()
        stream = self.watches.WatchResources(request, timeout=seconds + 20)
        found: list[watch_pb2.Event] = []
        for response in stream:
            if response.WhichOneof("marker") == "snapshot_end":
                break
        yield found
        missing = set(kinds)
        ends = time.monotonic() + seconds
        for response in stream:
            for change in response.changes:
                if change.WhichOneof("kind") == "event":
                    found.append(change.event)
                    missing.discard(change.event.type)
            if not missing:
                stream.cancel()
                return
            assert time.monotonic() < ends, f"no {[watch_pb2.EventType.Name(kind) for kind in missing]} in {seconds} s"


def nat(prefix: str = "192.168.177.0/24", ranges: tuple[int, int] | None = (10, 200)) -> network_pb2.NetworkSpec:
    """Return the spec of a NAT network with DHCP and DNS."""
    spec = network_pb2.NetworkSpec(domain_name="demo.test")
    spec.nat.SetInParent()
    add_subnet(spec, "lan", prefix, ranges)
    return spec


def add_subnet(spec: network_pb2.NetworkSpec, key: str, prefix: str, ranges: tuple[int, int] | None) -> None:
    base = ipaddress.ip_network(prefix).network_address
    spec.subnets[key].prefix = prefix
    if ranges is not None:
        spec.subnets[key].dhcp.ranges.add(first=str(base + ranges[0]), last=str(base + ranges[1]))


def new_uid() -> str:
    return str(uuid.uuid4())
