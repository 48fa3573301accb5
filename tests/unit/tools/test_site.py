"""The pages that are made for the documentation site."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2 as pb

from tools import protos, site
from virtfleet_client.reasons import catalogue


@functools.cache
def image() -> pb.FileDescriptorSet:
    with tempfile.TemporaryDirectory() as work:
        return protos.write_image(Path(work) / "image.binpb")


def row(**fields: str) -> dict[str, str]:
    return {"service": "compute", "rpc": "", "how": "", "by_design": "", **fields}


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"rpc": "DomainService.StartDomain"}, "yes"),
        ({"rpc": "DomainService.UpdateDomain", "how": "spec.memory.maximum_bytes"}, "yes"),
        ({"rpc": "DomainService.UpdateDomain", "how": "spec.memory.no_such_field"}, "planned"),
        ({"rpc": "DomainService.UpdateDomain", "how": "spec.disks.bus and status.pid"}, "yes"),
        ({"rpc": "DomainService.ListDomains", "how": "filter status.runtime_id"}, "yes"),
        ({"rpc": "DomainService.FlyDomain"}, "planned"),
        ({"service": "none", "rpc": "DomainService.StartDomain"}, "not needed"),
    ],
)
def test_a_function_can_be_done_by_methods_and_fields_that_are_there(fields: dict[str, str], state: str) -> None:
    there = frozenset({"DomainService.StartDomain", "DomainService.UpdateDomain", "DomainService.ListDomains"})
    assert site.libvirt_state(row(**fields), there, site.messages_of(image())) == state


def test_every_public_function_of_libvirt_is_on_the_page() -> None:
    page = site.libvirt_page(image())
    rows = site.libvirt_rows()
    assert len(rows) > 500
    assert all(f"| `{one['function']}` |" in page for one in rows)


def test_the_reference_has_every_method_message_and_comment() -> None:
    pages = "".join(site.reference_pages(image()).values())
    for text in (
        "### DomainService.StartDomain",
        "permission `domains.start`",
        "### DomainSpec",
        "| `maximum_bytes` |",
        "map of string to `virtfleet.compute.v1.Disk`",
        "`STOP_MODE_FORCE`",
    ):
        assert text in pages, text


def test_every_method_has_advice_and_every_reason_an_entry() -> None:
    advice = site.advice_page(image())
    assert "| DomainService.StartDomain | with the same request_id | 10 s, then WaitOperation |" in advice
    assert "| DomainService.ListDomains | freely | 5 s | `page_size`" in advice
    assert "| WatchService.WatchResources | resume by token | none |" in advice
    page = site.reasons_page()
    assert all(f"\n## {name}\n" in page for name in catalogue())
