from __future__ import annotations

import pytest

from virtfleet_client import Endpoint


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
