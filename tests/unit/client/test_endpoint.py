from __future__ import annotations

import pytest

from virtfleet_client import Endpoint
from virtfleet_client.endpoint import CHANNEL_OPTIONS


@pytest.mark.parametrize(
    ("uri", "target", "secure", "server_name"),
    [
        ("tls://127.0.0.1:7443", "127.0.0.1:7443", True, ""),
        ("gateway.example:7443", "gateway.example:7443", True, ""),
        ("tls://[2001:db8::1]:7443", "[2001:db8::1]:7443", True, ""),
        ("tls://10.0.0.1:7443?server_name=compute.n1.virtfleet.dev", "10.0.0.1:7443", True, "compute.n1.virtfleet.dev"),
        ("unix:///run/virtfleet/compute/admin.sock", "unix:/run/virtfleet/compute/admin.sock", False, ""),
    ],
)
def test_addresses(uri: str, target: str, *, secure: bool, server_name: str) -> None:
    assert Endpoint.parse(uri) == Endpoint(target, secure, server_name)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "tls://",
        "tls://host",
        "tls://host:port",
        "http://host:1",
        "unix://",
        "tls://host:99999",
        "tls://host:1/path",
    ],
)
def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"address|port|Port"):
        Endpoint.parse(uri)


def test_a_ping_that_is_not_answered_ends_the_connection_in_the_time_that_the_page_says() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] == 20_000
    # tests/clients/cases.yaml has a night's case that waits for it.
    assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"] == 10_000
