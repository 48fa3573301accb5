"""The domains that are measured: of a size that people have."""

from __future__ import annotations

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2

MIB = 1 << 20


def in_memory_domain(node: str, domain_id: str, *, padding_bytes: int = 0) -> domain_pb2.CreateDomainRequest:
    """Return the request for a domain of the driver `test`, serialised more than 1 kB with its status.

    Args:
        node: The node.
        domain_id: The id of the domain.
        padding_bytes: So much text more, as annotations.
    """
    request = domain_pb2.CreateDomainRequest(parent=f"nodes/{node}", domain_id=domain_id)
    domain = request.domain
    domain.display_name = f"Web server {domain_id} of the shop"
    domain.labels.update(
        {"app": "shop", "tier": "web", "env": "production", "team": "payments", "release": "2026.11.3"}
    )
    domain.annotations["shop.example/owner"] = "payments-oncall@shop.example"
    domain.annotations["shop.example/runbook"] = "https://runbooks.shop.example/web/restart-and-drain"
    while padding_bytes > 0:
        piece = min(padding_bytes, 1024)
        domain.annotations[f"shop.example/note-{len(domain.annotations)}"] = "n" * piece
        padding_bytes -= piece
    spec = domain.spec
    spec.driver = "test"
    spec.title = "Front end"
    spec.description = "Serves the shop's pages; two of it stand behind the balancer of each site."
    spec.autostart = resource_pb2.AUTOSTART_NEVER
    spec.on_exit.reboot = domain_spec_pb2.EXIT_ACTION_RESTART
    spec.cpu.vcpu_count = 2
    spec.memory.maximum_bytes = 64 * MIB
    for index in range(2):
        spec.serials[f"tty{index}"].port_number = index
    spec.rngs["random"].SetInParent()
    spec.balloons["balloon"].free_page_reporting = True
    spec.test.obeys_power_button = True
    return request
