"""The settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtfleet_gateway.feed import RING_LIMIT_BYTES
from virtfleet_service import names
from virtfleet_service.settings import ServiceSettings, SettingsError, split_address

NODE_LIFETIME_LIMITS: Final = (10, 366 * 86_400)
"""In seconds. Members look every two: with less than ten there would be no second attempt before the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings(ServiceSettings):
    """Is what a gateway has beside what every server has.

    Attributes:
        name: The id of the gateway, part of its identity and of its name `gateways/{name}`.
        authority_dir: Where `virtfleet authority init` has put the authority of the fleet.
        enrollment_listen: `host:port` for nodes that have no certificate yet; empty: nodes cannot join.
        hosts: The DNS names and addresses under which clients and nodes reach it; they stand in its certificate.
        member_endpoints: Where nodes reach gateways, `host:port`; empty: the first of `listen`.
        node_certificate_seconds: How long the certificates of nodes are good; they are renewed at half of it.
        watch_memory_bytes: As at every server, for each package of the fleet's watches; who is further behind is
            served by asking the nodes.
    """

    name: str = "gateway"
    authority_dir: Path = Path("/var/lib/virtfleet/authority")
    enrollment_listen: str = ""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1")
    member_endpoints: tuple[str, ...] = ()
    node_certificate_seconds: int = 86_400
    watch_memory_bytes: int = RING_LIMIT_BYTES

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the machine.

        Raises:
            SettingsError: A value cannot be used.
        """
        # Without the name of the class: slots make it another one than `super()` knows.
        ServiceSettings.__post_init__(self)
        if self.node:
            raise SettingsError("node: a gateway is not of a node")
        if not names.is_id(self.name):
            raise SettingsError(f"name: `{self.name}` is no id: a-z, 0-9 and `-`, beginning with a letter")
        if self.enrollment_listen:
            split_address(self.enrollment_listen, "enrollment_listen")
        for endpoint in self.member_endpoints:
            split_address(endpoint, "member_endpoints")
        if not NODE_LIFETIME_LIMITS[0] <= self.node_certificate_seconds <= NODE_LIFETIME_LIMITS[1]:
            raise SettingsError(
                f"node_certificate_seconds: {self.node_certificate_seconds} is not between {NODE_LIFETIME_LIMITS[0]} "
                f"and {NODE_LIFETIME_LIMITS[1]}"
            )
