"""After a boot of the node: what starts by itself, and what is not there yet at that moment."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.network.rig import DNSMASQ, Node, Refusal, nat
from virtfleet.network.v1 import network_pb2
from virtfleet.type.v1 import resource_pb2

RUNNING, INACTIVE = network_pb2.NETWORK_STATE_RUNNING, network_pb2.NETWORK_STATE_INACTIVE
CAPABILITIES = ("net_admin", "net_raw", "net_bind_service")


def until(holds: Callable[[], object], what: str, seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


def boot(node: Node) -> None:
    """End all that a boot ends, and have what is started next see another boot id."""
    for name in ("service", "launcher"):
        if name in node.processes:
            node.end(name, signal.SIGKILL)
    for pid in node.all_dnsmasq():
        os.kill(pid, signal.SIGKILL)
    for link in node.namespace.links():
        if link.startswith(("vf-", "vp-")):
            node.namespace("ip", "link", "del", link)
    node.namespace("nft", "flush", "ruleset")
    node.namespace("busybox", "sysctl", "-q", "-w", "net.ipv4.ip_forward=0")
    shutil.rmtree(node.folder / "run")
    fake = node.folder / "boot_id"
    fake.write_text(f"{uuid.uuid4()}\n")
    seen = f'mount --bind {fake} /proc/sys/kernel/random/boot_id && exec "$@"'
    node.prefix = [*node.namespace.prefix, "unshare", "--mount", "sh", "-c", seen, "sh"]


def define(node: Node, network_id: str, prefix: str, autostart: int, *, start: bool = False) -> None:
    spec = nat(prefix)
    spec.autostart = resource_pb2.Autostart.ValueType(autostart)
    node.create(network_id, spec, start=start)


def state(node: Node, network_id: str) -> int:
    return node.get(network_id).status.state


def test_what_starts_by_itself_does_so_once_a_boot(node: Node) -> None:
    define(node, "always", "10.1.0.0/24", resource_pb2.AUTOSTART_ALWAYS)
    define(node, "once", "10.2.0.0/24", resource_pb2.AUTOSTART_ONCE)
    define(node, "never", "10.3.0.0/24", resource_pb2.AUTOSTART_NEVER, start=True)
    boot(node)
    node.start_launcher()
    node.start_service()
    until(lambda: [state(node, one) for one in ("always", "once")] == [RUNNING, RUNNING], "they do not start")
    never = node.get("never").status
    assert (never.state, never.state_reason) == (INACTIVE, network_pb2.NETWORK_STATE_REASON_NODE_BOOTED)
    always, once = node.get("always"), node.get("once")
    assert always.status.state_reason == network_pb2.NETWORK_STATE_REASON_AUTOSTARTED
    assert (always.generation, always.spec.autostart) == (1, resource_pb2.AUTOSTART_ALWAYS)
    assert (once.generation, once.spec.autostart) == (2, resource_pb2.AUTOSTART_NEVER)
    assert always.status.bridge_name in node.namespace.links()
    guest = node.guest(always.status.bridge_name)
    assert guest.dhcp()["ip"].startswith("10.1.0.")
    # Another start of the service is no boot.
    node.stop("always")
    node.end("service", signal.SIGKILL)
    node.start_service()
    time.sleep(2)
    assert state(node, "always") == INACTIVE
    boot(node)
    node.start_launcher()
    node.start_service()
    until(lambda: state(node, "always") == RUNNING, "it does not start")
    assert state(node, "once") == INACTIVE


def test_a_launcher_that_comes_late_is_waited_for_and_the_service_serves_meanwhile(node: Node) -> None:
    define(node, "always", "10.1.0.0/24", resource_pb2.AUTOSTART_ALWAYS)
    boot(node)
    begun = time.monotonic()
    node.start_service()
    assert state(node, "always") == INACTIVE
    assert time.monotonic() - begun < 5
    # Longer than one call waits for it.
    time.sleep(8)
    assert state(node, "always") == INACTIVE
    assert "launcher" in node.get("always").status.state_message
    node.start_launcher()
    until(lambda: state(node, "always") == RUNNING, "it does not start")


def test_a_service_that_dies_before_all_has_started_goes_on(node: Node) -> None:
    define(node, "always", "10.1.0.0/24", resource_pb2.AUTOSTART_ALWAYS)
    node.create("other", nat("10.2.0.0/24"), start=False)
    boot(node)
    node.start_service()
    time.sleep(1)
    node.end("service", signal.SIGKILL)
    node.start_launcher()
    node.start_service()
    until(lambda: state(node, "always") == RUNNING, "it does not start")
    assert node.start("other").status.state == RUNNING


def test_a_network_that_can_never_start_has_its_time_and_costs_no_other(bare_node: Node) -> None:
    node = bare_node
    node.settings |= {"autostart_seconds": 3.0}
    node.start_launcher()
    node.start_service()
    define(node, "always", "10.1.0.0/24", resource_pb2.AUTOSTART_ALWAYS)
    define(node, "overlaps", "198.51.100.0/24", resource_pb2.AUTOSTART_ALWAYS)
    node.outside()
    boot(node)
    node.start_launcher()
    node.start_service()
    until(lambda: state(node, "always") == RUNNING, "it does not start")
    time.sleep(4)
    status = node.get("overlaps").status
    assert (status.state, status.state_reason) == (INACTIVE, network_pb2.NETWORK_STATE_REASON_START_FAILED)
    assert "SUBNET_OVERLAP" in status.state_message
    # Given up: what comes free later is the operator's to start.
    node.namespace("ip", "link", "del", "wan0")
    time.sleep(2)
    assert state(node, "overlaps") == INACTIVE
    node.start("overlaps")


@pytest.mark.parametrize(("name", "cause"), [("nft", "NFT_MISSING"), ("dnsmasq", "DNSMASQ_MISSING")])
def test_a_program_that_is_installed_later_is_found_at_the_next_use(bare_node: Node, name: str, cause: str) -> None:
    node = bare_node
    program = node.folder / name
    node.settings |= {name: str(program)}
    flags = [f"--ambient-capability={path}={one}" for path in (DNSMASQ, program) for one in CAPABILITIES]
    node.start_launcher("--executable", str(program), *flags)
    node.start_service()
    define(node, "always", "10.1.0.0/24", resource_pb2.AUTOSTART_ALWAYS)
    with pytest.raises(Refusal) as refused:
        node.start("always")
    assert (refused.value.reason, refused.value.metadata["cause"]) == ("DRIVER_BROKEN", cause)
    original = shutil.which(name, path="/usr/sbin")
    assert original is not None
    install(Path(original), program)
    assert node.start("always").status.state == RUNNING
    bridge = node.get("always").status.bridge_name
    assert node.guest(bridge).dhcp()["ip"].startswith("10.1.0.")
    # And at a boot at which it is not there yet.
    program.unlink()
    boot(node)
    node.start_launcher("--executable", str(program), *flags)
    node.start_service()
    until(lambda: name in node.get("always").status.state_message, "no word of it")
    install(Path(original), program)
    until(lambda: state(node, "always") == RUNNING, "it does not start")


def install(original: Path, program: Path) -> None:
    fresh = program.with_name("fresh")
    shutil.copy(original, fresh)
    fresh.chmod(0o755)
    fresh.rename(program)
