"""docs/operations.md, line by line: a gateway on one machine, a node on another, joined over the network.

Both are booted by systemd, which starts what the page says from the units that we ship.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import doc_blocks
from tests.integration.deploy.machines import Machine, Site, site
from tools.paths import ROOT

PAGE = ROOT / "docs" / "operations.md"
ME = "tests/integration/deploy/test_two_machines.py::test_the_page_installs_a_fleet_on_two_machines"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SEES = {
    "VIRTFLEET_ADDRESS": "gateway.example.com:7443",
    "VIRTFLEET_CA_FILE": "alice/ca.crt",
    "VIRTFLEET_CERT_FILE": "alice/alice.crt",
    "VIRTFLEET_KEY_FILE": "alice/alice.key",
}


def lines(section: str) -> list[str]:
    """Return the blocks of a section of the page that this test runs."""
    found = [block.text for block in doc_blocks.blocks(PAGE) if block.section == section and block.why == ME]
    assert found, section
    return found


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


@pytest.mark.timeout(300)
def test_the_page_installs_a_fleet_on_two_machines(machines: Site) -> None:
    image = machines.image("image")
    image.run("printf '192.0.2.1 gateway.example.com\n' >> /etc/hosts; mkdir -p /srv/admin")
    (install,) = lines("Install by hand")
    build, venv, rest = install.partition("python3 -m venv")
    told = "systemctl daemon-reload\n"
    assert told in rest
    image.run(build, ROOT, online=True)
    # With the distribution's Python, as services do not see what lies in somebody's home; and nobody is there to be told.
    image.run(venv + rest.replace(told, ""), ROOT, {"PATH": SYSTEM_PATH}, online=True)
    image.end()
    gateway, node = machines.machine("gateway", "image"), machines.machine("node", "image")
    for machine in (gateway, node):
        machine.run(told)
    machines.join(gateway, "192.0.2.1/24", node, "192.0.2.11/24")

    assert "n1" not in gateway.run("\n".join(lines("The gateway")), "/srv/admin")
    token = gateway.run("cat /srv/admin/token")
    node.run(f"umask 077; printf %s '{token}' > /srv/admin/token")
    node.run("\n".join(lines("A node")), "/srv/admin")
    ready = 'for _ in $(seq 100); do virtfleet node list | grep "n1 .*READY" && exit; sleep 0.2; done; virtfleet node list; exit 1'
    gateway.run(ready, "/srv/admin", SEES)
    a_guest_runs(gateway, node)
    the_guest_outlives_services(gateway, node)

    backup, restore = lines("Backup and restore")
    gateway.run(backup, "/srv/admin")
    gateway.run("virtfleet node cordon n1", "/srv/admin", SEES)
    gateway.run(restore, "/srv/admin")
    gateway.run(ready, "/srv/admin", SEES)
    assert "CORDONED" not in gateway.run("virtfleet node list", "/srv/admin", SEES).upper()

    (revoke,) = lines("Certificates")
    assert "certificates/c" in gateway.run(revoke, "/srv/admin", SEES)
    bob = {**SEES, "VIRTFLEET_CERT_FILE": "bob/bob.crt", "VIRTFLEET_KEY_FILE": "bob/bob.key"}
    refused = gateway.run("sleep 1; virtfleet node list && exit 9 || true", "/srv/admin", bob)
    assert "CERTIFICATE_REVOKED" in refused
    assert "RUNNING" in gateway.run("virtfleet get domain n1/first", "/srv/admin", SEES), "the guest ran on"
    gateway.run("virtfleet stop --force first; virtfleet stop pools/images net/n1/lan", "/srv/admin", SEES)


def a_guest_runs(gateway: Machine, node: Machine) -> None:
    """Start a guest from the gateway's machine, and see it on the node's."""
    lan = {"prefix": "192.168.190.0/24", "dhcp": {"ranges": [{"first": "192.168.190.10", "last": "192.168.190.99"}]}}
    card = {"lan": {"network": "networks/lan"}}
    documents = [
        {"kind": "pool", "name": "n1/images", "spec": {"dir": {}}},
        {"kind": "network", "name": "n1/lan", "spec": {"nat": {}, "subnets": {"v4": lan}}},
        {
            "kind": "domain",
            "name": "n1/first",
            "spec": {"driver": "qemu", "memory": {"maximum_bytes": "64MiB"}, "interfaces": card},
        },
    ]
    text = "\n---\n".join(json.dumps(document) for document in documents)
    gateway.run(
        f"cat > first.yaml <<'END'\n{text}\nEND\n"
        # In the order in which one needs the other, whatever order they are named in.
        "virtfleet apply -f first.yaml; virtfleet start first networks/lan pools/images",
        "/srv/admin",
        SEES,
    )
    said = node.run("cat /proc/*/cmdline | tr '\\0' ' '")
    assert "qemu-system" in said
    inside = subprocess.run(
        ["nsenter", f"--target={gateway.pid}", "--pid", "--mount", "ps", "ax"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "qemu-system" not in inside.stdout


def the_guest_outlives_services(gateway: Machine, node: Machine) -> None:
    """Restart, kill, stop and start what runs beside a guest, the launcher too."""
    find = "pgrep --full qemu-system"
    guest = node.run(find)
    assert len(guest.split()) == 1, guest
    for verb in ("restart", "kill --signal=KILL --kill-who=main"):
        for service in ("launcher", "storage", "network", "compute"):
            node.run(f"systemctl {verb} virtfleet-{service}")
            assert node.run(find) == guest, (verb, service)
    # A service that was killed is started again; a target takes all but the launcher with it.
    node.run(
        "systemctl stop virtfleet.target; ! systemctl is-active virtfleet-compute; systemctl start virtfleet.target"
    )
    assert node.run(find) == guest
    seen = "for _ in $(seq 100); do virtfleet get domain n1/first | grep RUNNING && exit; sleep 0.2; done; exit 1"
    gateway.run(seen, "/srv/admin", SEES)
    assert node.run("systemctl list-units --failed --quiet --no-legend --plain 'virtfleet*'") == ""
