"""Start plans whose arguments are kept as text in `golden/`: `python -m tests.unit.compute.qemu.cases` writes them anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_compute.drivers.api import BackingFile, DomainRef, FileConnection, StartPlan, TapConnection
from virtfleet_compute.drivers.qemu import arguments, resolution
from virtfleet_compute.drivers.qemu.probe import Emulator

GOLDEN = Path(__file__).parent / "golden"
MIB = 1024 * 1024
DOMAIN = DomainRef("nodes/n1/domains/web", "6f0c2d0e-7f0b-4f43-9f0a-0d5c1a8e2b11")
EMULATOR = Emulator(
    binary="/usr/bin/qemu-system-x86_64",
    version="7.2.22",
    machines={"pc-i440fx-7.2": 255, "pc-i440fx-7.1": 255, "pc-q35-7.2": 288, "pc-q35-7.1": 288, "microvm": 288},
    aliases={"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2"},
    cpu_models={"Skylake-Server": "Skylake-Server-v1", "Skylake-Server-v1": "Skylake-Server-v1", "qemu64": "qemu64-v1"},
    cpu_features=frozenset({"avx2", "avx512f", "vmx", "svm"}),
    maximum_features=frozenset({"avx2", "svm"}),
    has_sandbox=True,
    has_io_uring=True,
)
HOST = resolution.Host(EMULATOR, "tcg")
NASTY = 'a,b=c,,d "quoted" {fd:qmp} ${HOME} \\ \n,file.driver=nbd'


def resolved(spec: domain_spec_pb2.DomainSpec) -> domain_spec_pb2.DomainSpec:
    return resolution.resolve(DOMAIN.uid, spec, None, HOST)


def plan(spec: domain_spec_pb2.DomainSpec, **connections: object) -> StartPlan:
    return StartPlan(
        domain=DOMAIN,
        runtime_id="r",
        spec=resolved(spec),
        run_as_uid=20001,
        paused=False,
        **connections,  # type: ignore[arg-type]  # fields of the plan
    )


def _spec() -> domain_spec_pb2.DomainSpec:
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.maximum_bytes = 256 * MIB
    return spec


def bare() -> StartPlan:
    return plan(_spec())


def kernel() -> StartPlan:
    spec = _spec()
    spec.os.kernel.kernel_volume = "pools/p/volumes/kernel"
    spec.os.kernel.initrd_volume = "pools/p/volumes/initrd"
    spec.os.kernel.command_line = 'console=ttyS0 quiet x="a,b" -drive file=/etc/shadow'
    spec.serials["tty"].SetInParent()
    spec.disks["root"].volume = "pools/p/volumes/root"
    spec.interfaces["lan"].network = "networks/n"
    spec.interfaces["lan"].mac_address = "52:54:00:00:00:01"
    return plan(
        spec,
        kernel=FileConnection("/pools/p/kernel", "raw"),
        initrd=FileConnection("/pools/p/initrd", "raw"),
        disks={"root": FileConnection("/pools/p/root", "qcow2", (BackingFile("/pools/p/base", "raw"),))},
        interfaces={"lan": TapConnection("vf-1a2b", "vfbr0", "52:54:00:00:00:01", 1400, "p")},
    )


def disks(machine: str) -> StartPlan:
    spec = _spec()
    spec.os.machine = machine
    connections = {}
    for number, (name, bus) in enumerate(device_pb2.DiskBus.items()):
        if name in ("DISK_BUS_UNSPECIFIED", "DISK_BUS_USB") or (name == "DISK_BUS_IDE" and machine == "q35"):
            continue
        key = name.removeprefix("DISK_BUS_").lower()
        disk = spec.disks[key]
        disk.volume = f"pools/p/volumes/{key}"
        disk.bus = bus
        disk.cache = device_pb2.DiskCache.values()[number]
        disk.detect_zeroes = number % 2 == 1
        disk.discard = device_pb2.DISK_DISCARD_IGNORE if number == 2 else device_pb2.DISK_DISCARD_UNMAP
        connections[key] = FileConnection(f"/pools/p/{key}", "qcow2" if number % 2 else "raw")
    spec.disks["virtio"].boot_order = 1
    spec.disks["shared"].volume = "pools/p/volumes/shared"
    spec.disks["shared"].shareable = True
    spec.disks["shared"].read_only = True
    spec.disks["shared"].serial_number = ""
    connections["shared"] = FileConnection("/pools/p/shared", "raw")
    spec.disks["cd"].empty.SetInParent()
    spec.disks["cd"].device = device_pb2.DISK_DEVICE_CDROM
    spec.disks["iso"].volume = "pools/p/volumes/iso"
    spec.disks["iso"].device = device_pb2.DISK_DEVICE_CDROM
    spec.disks["iso"].bus = device_pb2.DISK_BUS_SCSI
    connections["iso"] = FileConnection("/pools/p/iso", "raw")
    return plan(spec, disks=connections)


def devices() -> StartPlan:
    spec = _spec()
    spec.os.machine = "pc-q35-7.1"
    spec.cpu.vcpu_count = 2
    spec.cpu.maximum_vcpu_count = 8
    spec.cpu.topology.socket_count = 2
    spec.cpu.topology.core_count = 2
    spec.cpu.topology.thread_count = 2
    spec.cpu.model = "Skylake-Server"
    spec.cpu.features.add(name="avx2")
    spec.cpu.features.add(name="vmx", policy=domain_spec_pb2.CPU_FEATURE_POLICY_DISABLE)
    spec.memory.current_bytes = 128 * MIB
    for number, name in enumerate(("lan", "dmz", "old", "dark"), 1):
        card = spec.interfaces[name]
        card.model = device_pb2.InterfaceModel.values()[number]
        card.mac_address = f"52:54:00:00:00:0{number}"
    spec.interfaces["lan"].boot_order = 2
    spec.interfaces["lan"].mtu_bytes = 9000
    spec.serials["a"].log_bytes = 65536
    spec.serials["b"].port_number = 0
    spec.consoles["a-console-with-a-long-name"].SetInParent()
    spec.consoles["hvc"].port_number = 0
    spec.rngs["rng"].bytes_per_second_max = 1024
    spec.rngs["fast"].SetInParent()
    spec.watchdogs["dog"].action = device_pb2.WATCHDOG_ACTION_POWER_OFF
    spec.panics["panic"].SetInParent()
    spec.on_exit.reboot = domain_spec_pb2.EXIT_ACTION_PRESERVE
    taps = {
        name: TapConnection(f"tap{number}", "br0", f"52:54:00:00:00:0{number}", 1500, "p")
        for number, name in enumerate(("lan", "dmz", "old"), 1)
    }
    return plan(spec, interfaces=taps)


def hostile() -> StartPlan:
    """Nothing that a caller or a pool chose becomes an option or a descriptor."""
    spec = _spec()
    key = "a" * 32
    spec.disks[key].host_path = f"/{NASTY}"
    spec.disks[key].format = device_pb2.DISK_FORMAT_QCOW2
    spec.qemu.sandbox = domain_spec_pb2.QEMU_SANDBOX_OFF
    chain = (BackingFile(f"/behind {NASTY}", "qcow2"), BackingFile('json:{"driver":"nbd"}', "raw"))
    return plan(spec, disks={key: FileConnection(f"/{NASTY}", "qcow2", chain)})


CASES: Mapping[str, Callable[[], StartPlan]] = {
    "bare": bare,
    "kernel": kernel,
    "disks-pc": lambda: disks("pc"),
    "disks-q35": lambda: disks("q35"),
    "devices": devices,
    "hostile": hostile,
}


def text(made: StartPlan) -> str:
    """Return the call of a plan as text: a line per option, then what the launcher opens."""
    invocation = arguments.build(made, EMULATOR.binary, "tcg", sandbox=True)
    lines: list[str] = []
    for word in invocation.argv:
        if word.startswith("-") or not lines or " " in lines[-1] or not lines[-1].startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    lines += [f"socket {item.name} {item.mode:o}" for item in invocation.sockets]
    lines += [f"tap {tap.name} {tap.ifname}" for tap in invocation.taps]
    lines += [f"console {item.name} {item.ring_bytes}" for item in invocation.consoles]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, case in CASES.items():
        (GOLDEN / f"{name}.args").write_text(text(case()))
