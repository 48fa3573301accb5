"""A development fleet: an authority, a gateway and nodes, every process real and its own, mutual TLS on every hop.

The gateway stays in the caller's network namespace and listens on 127.0.0.1; each node is a namespace of its own, in
which its launcher and its compute, storage and network services run. Everything else is kept in one folder below /tmp,
which other users (the guests' numeric ones) may pass through but not read.

    async with Fleet.running(Plan(nodes=1)) as fleet:
        …
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tools import devnet, leftovers, toml
from tools.paths import ROOT
from tools.supervisor import Program, Supervisor
from virtfleet.fleet.v1 import node_pb2
from virtfleet_client import Credentials, connect_async

RUN = Path(os.environ.get("VIRTFLEET_RUN") or ROOT / ".run")
SERVICES = ("storage", "network", "compute")
PORTS = {"compute": 7101, "storage": 7102, "network": 7103}
READY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Is what is asked of a fleet.

    Attributes:
        nodes: How many.
        driver: The drivers, comma-separated, the first is the one that domains get by default: `qemu`, `test`.
        address_range: Where the links between gateway and nodes take their addresses; empty: a free one is found.
        port: The gateway's port on 127.0.0.1; 0: a free one.
        settings: More settings for every service, by service and key; for tests.
        metrics: Whether the gateway serves its metrics, at the address VIRTFLEET_METRICS_ADDRESS of `fleet.env`.
    """

    nodes: int = 1
    driver: str = "qemu"
    address_range: str = ""
    port: int = 0
    settings: Mapping[str, Mapping[str, object]] | None = None
    metrics: bool = False


class Fleet:
    """Is a fleet that runs. Made by `running`.

    Attributes:
        tag: Stands in the name of everything that the fleet makes.
        folder: Where it keeps everything.
        address: The gateway, `host:port`.
        nodes: The ids of the nodes.
        supervisor: Its processes.
    """

    def __init__(self, plan: Plan, run_folder: Path | None, say: Callable[[str], None]) -> None:
        self.plan = replace(plan, address_range=plan.address_range or devnet.free_range(plan.nodes))
        self.tag = secrets.token_hex(3)
        self.folder = Path(tempfile.mkdtemp(prefix=f"virtfleet-{self.tag}-", dir="/tmp"))
        self.folder.chmod(0o711)
        self.run_folder = run_folder if run_folder is not None else self.folder / "run"
        self.nodes = [f"n{index}" for index in range(1, plan.nodes + 1)]
        self.networks = {
            node: devnet.NodeNetwork.plan(self.tag, index, self.plan.address_range)
            for index, node in enumerate(self.nodes, start=1)
        }
        self.port = plan.port or _free_port("127.0.0.1")
        self.address = f"127.0.0.1:{self.port}"
        self._metrics = f"127.0.0.1:{_free_port('127.0.0.1')}" if plan.metrics else ""
        self.supervisor = Supervisor()
        self._say = say
        self._namespace_inodes: set[int] = set()
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "VIRTFLEET_LOG_LEVEL": os.environ.get("VIRTFLEET_LOG_LEVEL", "info"),
        }

    @property
    def credentials(self) -> Mapping[str, Path]:
        """The files of an administrator: `ca`, `certificate` and `key`."""
        folder = self.folder / "admin"
        return {"ca": folder / "ca.crt", "certificate": folder / "admin.crt", "key": folder / "admin.key"}

    @property
    def cgroup_parent(self) -> Path | None:
        """Below which guests get their control groups; None where there is no writable cgroup v2 tree."""
        for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
            if (root / "cgroup.procs").exists() and os.access(root, os.W_OK) and os.geteuid() == 0:
                return root / f"virtfleet-{self.tag}"
        return None

    @classmethod
    @asynccontextmanager
    async def running(
        cls, plan: Plan, *, run_folder: Path | None = None, say: Callable[[str], None] = lambda _: None
    ) -> AsyncIterator[Fleet]:
        """Make a fleet, wait until it is ready, and take it away again.

        Args:
            plan: What is asked for.
            run_folder: Where to write `fleet.env` and the pid files; None: inside the fleet's own folder.
            say: Is told of each step.

        Raises:
            RuntimeError: A part does not come up; the text is the end of its log.
        """
        fleet = cls(plan, run_folder, say)
        try:
            await fleet._start()
            yield fleet
        finally:
            await fleet._stop()

    async def _start(self) -> None:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self._remember()
        await self._start_authority()
        for node in self.nodes:
            self.networks[node].make()
            self._namespace_inodes.add(Path(f"/run/netns/{self.networks[node].namespace}").stat().st_ino)
        self._remember()
        await self._start_gateway()
        await asyncio.gather(*(self._start_node(node) for node in self.nodes))
        await self._wait_until_ready()
        self._write_environment()

    async def _start_authority(self) -> None:
        await self._command("authority", "init", "--directory", str(self.folder / "authority"))
        await self._command(
            "authority", "issue", "admin", "--role", "admin",
            "--directory", str(self.folder / "authority"), "--output", str(self.folder / "admin"),
        )  # fmt: skip
        self._say("authority made, certificate of an administrator issued")

    async def _start_gateway(self) -> None:
        members = self.networks[self.nodes[0]].outer_address
        self._enrollment = f"{members}:{_free_port(members)}"
        self._members = f"{members}:{_free_port(members)}"
        settings = self.folder / "gateway.toml"
        toml.write(
            settings,
            {
                "name": "g1",
                "state_dir": str(self.folder / "gateway"),
                "run_dir": str(self.folder / "gateway/run"),
                "authority_dir": str(self.folder / "authority"),
                "listen": f"{self.address},{self._members}",
                "enrollment_listen": self._enrollment,
                "hosts": ["127.0.0.1", "localhost", members],
                "member_endpoints": [self._members],
                **({"telemetry": {"prometheus": self._metrics}} if self._metrics else {}),
                **(self.plan.settings or {}).get("gateway", {}),
            },
        )
        await self.supervisor.start(
            Program(
                name="gateway",
                command=[sys.executable, "-m", "virtfleet_gateway", "--config", str(settings)],
                pid_file=self.run_folder / "gateway.pid",
                log_file=self.folder / "gateway.log",
                environment=self._environment,
            )
        )
        await self._wait_for_port(self.address, "gateway")
        self._say(f"gateway at {self.address}")

    async def _start_node(self, node: str) -> None:
        network = self.networks[node]
        base = self.folder / node
        (self.run_folder / node).mkdir(exist_ok=True)
        for part in ("run", "state", "pools"):
            (base / part).mkdir(parents=True)
            (base / part).chmod(0o711)
        base.chmod(0o711)
        token = (await self._command("node", "token", node)).strip()
        endpoints = [f"{service}={network.address}:{PORTS[service]}" for service in SERVICES]
        await _finish(
            network.enter(
                sys.executable, "-m", "virtfleet_cli", "join", "--gateway", self._enrollment,
                "--token-file", "-", "--directory", str(base / "state/identity"),
                *(argument for endpoint in endpoints for argument in ("--endpoint", endpoint)),
            ),
            environment=self._environment,
            text=token,
        )  # fmt: skip
        await self._start_launcher(node)
        for service in SERVICES:
            settings = base / f"{service}.toml"
            toml.write(settings, self._service_settings(node, service))
            await self._start_process(
                node, service, [sys.executable, "-m", f"virtfleet_{service}", "--config", str(settings)]
            )
        for service in SERVICES:
            await self._wait_for_port(f"{network.address}:{PORTS[service]}", f"{node}/{service}")
        self._say(f"{node} enrolled and serving in namespace {network.namespace}")

    def _service_settings(self, node: str, service: str) -> dict[str, object]:
        base = self.folder / node
        identity = base / "state/identity"
        settings: dict[str, object] = {
            "node": node,
            "state_dir": str(base / "state"),
            "run_dir": str(base / "run"),
            "listen": f"{self.networks[node].address}:{PORTS[service]}",
            "identity_dir": str(identity),
        }
        if service == "storage":
            settings["pools_root"] = str(base / "pools")
        if service == "compute" and not _other_users():
            # Guests run as the one user that there is; GetHost says so.
            settings["guest_uid_count"] = 0
        if service == "compute":
            settings["enabled_drivers"] = self.plan.driver.split(",")
        settings.update((self.plan.settings or {}).get(service, {}))
        return settings

    async def _start_launcher(self, node: str) -> None:
        base = self.folder / node
        executables = [
            path for name in ("qemu-system-x86_64", "qemu-system-aarch64", "dnsmasq") if (path := shutil.which(name))
        ]
        dnsmasq = [path for path in executables if path.endswith("dnsmasq")]
        settings: dict[str, object] = {"run_dir": str(base / "run/launcher"), "executables": executables}
        parent = self.cgroup_parent
        if os.geteuid() == 0 and dnsmasq:
            settings["ambient_capabilities"] = {dnsmasq[0]: ["net_admin", "net_raw", "net_bind_service"]}
        if parent is not None:
            parent.mkdir(exist_ok=True)
            settings["cgroup_parent"] = str(parent / node)
        if not _other_users():
            settings["single_user"] = True
        settings.update((self.plan.settings or {}).get("launcher", {}))
        settings_file = base / "launcher.toml"
        toml.write(settings_file, settings)
        await self._start_process(
            node,
            "launcher",
            [
                sys.executable,
                "-I",
                "-S",
                str(ROOT / "services/launcher/virtfleet_launcher/__main__.py"),
                "--config",
                str(settings_file),
            ],
        )

    async def _start_process(self, node: str, name: str, command: list[str]) -> None:
        await self.supervisor.start(
            Program(
                name=f"{node}/{name}",
                command=self.networks[node].enter(*command),
                pid_file=self.run_folder / node / f"{name}.pid",
                log_file=self.folder / node / f"{name}.log",
                environment=self._environment,
            )
        )

    async def _command(self, *arguments: str) -> str:
        """Run the `virtfleet` command as the administrator of this fleet."""
        return await _finish(
            [sys.executable, "-m", "virtfleet_cli", *arguments], environment={**self._environment, **self.environment()}
        )

    def environment(self) -> dict[str, str]:
        """Return the variables that point clients to this fleet, as in `fleet.env`."""
        files = self.credentials
        return {
            "VIRTFLEET_ADDRESS": self.address,
            "VIRTFLEET_CA_FILE": str(files["ca"]),
            "VIRTFLEET_CERT_FILE": str(files["certificate"]),
            "VIRTFLEET_KEY_FILE": str(files["key"]),
            "VIRTFLEET_NODES": ",".join(self.nodes),
            **({"VIRTFLEET_METRICS_ADDRESS": self._metrics} if self._metrics else {}),
        }

    def _write_environment(self) -> None:
        lines = [f"export {key}='{value}'" for key, value in self.environment().items()]
        staged = self.run_folder / ".fleet.env"
        staged.write_text("\n".join(lines) + "\n")
        staged.replace(self.run_folder / "fleet.env")

    def _remember(self) -> None:
        """Write down what `clean` must know if this process is killed."""
        content = {
            "tag": self.tag,
            "folder": str(self.folder),
            "checkout": str(ROOT),
            "supervisor": os.getpid(),
            "supervisor_start_time": _start_time(os.getpid()),
            "nodes": self.nodes,
            "range": self.plan.address_range,
            "namespace_inodes": sorted(self._namespace_inodes),
            "cgroup_parent": str(self.cgroup_parent or ""),
        }
        (self.run_folder / "fleet.json").write_text(json.dumps(content))

    async def _wait_until_ready(self) -> None:
        """Wait until the gateway sees every node ready.

        Raises:
            RuntimeError: One does not become ready; the text is what the gateway says of it.
        """
        files = self.credentials
        credentials = Credentials(files["ca"], files["certificate"], files["key"])
        ends_at = time.monotonic() + READY_SECONDS
        async with connect_async(f"tls://{self.address}", credentials) as connection:
            for node in self.nodes:
                while True:
                    seen = await connection.nodes.GetNode(node_pb2.GetNodeRequest(name=f"nodes/{node}"), timeout=10)
                    if seen.status.state == node_pb2.NODE_STATE_READY:
                        break
                    if time.monotonic() > ends_at:
                        raise RuntimeError(f"{node} does not become ready: {seen.status}")
                    await asyncio.sleep(0.05)
        self._say(f"{len(self.nodes)} nodes ready")

    async def _wait_for_port(self, address: str, name: str) -> None:
        ends_at = time.monotonic() + READY_SECONDS
        host, _, port = address.rpartition(":")
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                if time.monotonic() > ends_at:
                    raise RuntimeError(f"{name} does not listen on {address}:\n{self.log_tail(name)}") from None
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return

    def log_tail(self, name: str) -> str:
        """Return the last lines that a process has printed."""
        path = self.supervisor.programs[name].log_file
        return "\n".join(path.read_text(errors="replace").splitlines()[-25:])

    async def _stop(self) -> None:
        await self.supervisor.stop_all()
        await asyncio.to_thread(take_away, self.run_folder)

    def leftovers(self) -> leftovers.Leftovers:
        """Look for what is left of this fleet on the machine."""
        return leftovers.look(self.tag, self.folder, frozenset(self._namespace_inodes), self.cgroup_parent)


def take_away(run_folder: Path) -> None:
    """Take away whatever a fleet has left, its guests included; succeeds if there is nothing.

    Works from `fleet.json` and the kernel alone, so it serves after SIGKILL of the supervisor too.
    """
    record = run_folder / "fleet.json"
    if not record.exists():
        return
    content = json.loads(record.read_text())
    folder, tag = Path(content["folder"]), content["tag"]
    parent = Path(content["cgroup_parent"]) if content["cgroup_parent"] else None
    inodes = frozenset(content["namespace_inodes"])
    _end_processes(lambda: leftovers.look(tag, folder, inodes, parent).processes)
    for index in range(1, len(content["nodes"]) + 1):
        devnet.NodeNetwork.plan(tag, index, content["range"]).remove()
    if parent is not None and parent.is_dir():
        for path in sorted((path for path in parent.rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        parent.rmdir()
    shutil.rmtree(folder, ignore_errors=False) if folder.exists() else None
    for node in content["nodes"]:
        shutil.rmtree(run_folder / node, ignore_errors=True)
    for name in ("fleet.env", "gateway.pid", "fleet.json"):
        (run_folder / name).unlink(missing_ok=True)


def orphans(place: Path = Path("/tmp")) -> Iterator[Path]:
    """Yield the run folders of fleets of this checkout whose supervisor is gone: those of tests that were killed.

    Anybody may write below /tmp, and what a record names is removed: only a folder that is ours is believed, where
    nobody else can put anything, and only about itself.
    """
    for folder in place.glob("virtfleet-*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
                continue
            content = json.loads((folder / "run" / "fleet.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            continue  # taken away while we looked, or no fleet
        if (content["folder"], content.get("checkout")) == (str(folder), str(ROOT)) and (
            _start_time(content["supervisor"]) != content["supervisor_start_time"]
        ):
            yield folder / "run"


def _start_time(pid: int) -> int:
    """Return when a process began, in ticks since the boot (proc(5)); 0: there is none of that number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[19])


def _end_processes(find: Callable[[], tuple[str, ...]]) -> None:
    """Send SIGKILL to processes, given as `pid command`, until none is found; gives up after 2.5 s."""
    for _ in range(50):
        found = find()
        for line in found:
            try:
                os.kill(int(line.split()[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended by itself
        if not found:
            break
        time.sleep(0.05)


def _other_users() -> bool:
    """Tell whether processes can be given numeric ids of their own here."""
    if os.geteuid() != 0:
        return False
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = (int(part) for part in line.split())
        if inside == 0 and count > 30_000:
            return True
    return False


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def _finish(command: list[str], *, environment: Mapping[str, str], text: str = "") -> str:
    """Run a command to its end and return what it prints.

    Raises:
        RuntimeError: It fails.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(environment),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(text.encode()), 60)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode(errors='replace').strip()}")
    return out.decode()


if __name__ == "__main__":
    take_away(RUN)
    for run_folder in orphans():
        take_away(run_folder)
