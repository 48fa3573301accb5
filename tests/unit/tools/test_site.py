"""The pages of the documentation that are made, and the site."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import tempfile
from pathlib import Path

import pytest
from google.longrunning import operations_pb2  # noqa: F401 - makes its service known
from google.protobuf import descriptor_pb2 as pb
from google.protobuf import descriptor_pool, message_factory

import virtfleet
from tools import pages, protos, site
from tools.paths import ROOT
from virtfleet.type.v1 import method_pb2
from virtfleet_client import calls
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
    assert pages.libvirt_state(row(**fields), there, pages.messages_of(image())) == state


def test_every_public_function_of_libvirt_is_on_the_page() -> None:
    page = pages.libvirt_page(image())
    rows = pages.libvirt_rows()
    assert len(rows) > 500
    assert all(f"| `{one['function']}` |" in page for one in rows)


def test_the_reference_has_every_method_message_and_comment() -> None:
    text = "".join(pages.reference_pages(image()).values())
    for wanted in (
        "### DomainService.StartDomain",
        "permission `domains.start`",
        "### DomainSpec",
        "| `maximum_bytes` |",
        "map of string to `virtfleet.compute.v1.Disk`",
        "`STOP_MODE_FORCE`",
    ):
        assert wanted in text, wanted


def test_every_method_has_advice_and_every_reason_an_entry() -> None:
    advice = pages.advice_page(image())
    assert "| DomainService.StartDomain | with the same request_id | 10 s, then WaitOperation |" in advice
    assert "| DomainService.ListDomains | freely | 5 s | `page_size` up to 5,000 |" in advice
    assert "| VolumeService.ListVolumes | freely | 5 s | `page_size` up to 5,000 |" in advice
    assert "| WatchService.WatchResources | resume by token | none |" in advice
    page = pages.reasons_page()
    assert all(f"\n## {name}\n" in page for name in catalogue())


def linked(text: str, page: str) -> str:
    path = ROOT / page
    return site.for_the_site(text, path, site.pages())


def test_links_of_the_repository_become_links_of_the_site() -> None:
    assert linked(
        "[a](../clients/go/README.md#what) [b](../clients/python/virtfleet_client/data/reasons.toml)", "docs/grpcurl.md"
    ) == ("[a](clients/go.md#what) [b](reasons.md)")
    assert linked("[a](../README.md) ![c](soak.svg) [d](#e)", "docs/operations.md") == "a ![c](soak.svg) [d](#e)"
    assert linked("[up](../README.md) [docs](../../docs/python.md)", "clients/go/README.md") == (
        "[up](index.md) [docs](../python.md)"
    )
    assert linked("[why](adr) [x](../Makefile)\n\n```text\n[x](y)\n```\n", "docs/architecture.md") == (
        "[why](adr/index.md) x\n\n```text\n[x](y)\n```\n"
    )


def test_a_link_that_leads_nowhere_stops_the_build() -> None:
    with pytest.raises(site.DeadLinkError, match=r"docs/grpcurl.md: gone.md leads nowhere"):
        linked("[a](gone.md)", "docs/grpcurl.md")


def test_every_page_that_is_made_stands_for_its_source() -> None:
    assert set(pages.made_pages(image())) == set(pages.MADE_FROM)
    assert all((ROOT / source).exists() for source in pages.MADE_FROM.values())
    assert linked("[x](../protos/virtfleet/fake/v1) [y](data/libvirt-api.tsv)", "docs/fake-fleet.md") == (
        "[x](reference/virtfleet.fake.v1.md) [y](libvirt-functions.md)"
    )


def test_the_advice_is_what_the_clients_do() -> None:
    """A unary call is repeated by the Python client exactly where the page says that it may be."""
    for found in pkgutil.walk_packages(virtfleet.__path__, "virtfleet."):
        if found.name.endswith("_pb2"):
            importlib.import_module(found.name)
    pool = descriptor_pool.Default()
    wrong, count = [], 0
    for package, name, repeat, deadline, _ in pages.advice_rows(image()):
        if deadline == "none":
            continue
        method = pool.FindMethodByName(f"{package}.{name}")
        path = f"/{package}.{name.replace('.', '/')}"
        request = message_factory.GetMessageClass(method.input_type)()
        sent, repeated = calls.prepare(path, request)
        has_id = "request_id" in sent.DESCRIPTOR.fields_by_name and bool(getattr(sent, "request_id", ""))
        said = "no" if not repeated else "with the same request_id" if has_id else "freely"
        count += 1
        if said != repeat:
            wrong.append((path, repeat, said))
    assert not wrong
    assert count > 60
    for name, repeated in (("Get", True), ("List", True), ("Wait", True), ("Cancel", False), ("Delete", False)):
        page = pages.advice_page(image())
        path = f"/google.longrunning.Operations/{name}Operation{'s' if name == 'List' else ''}"
        (row,) = [line for line in page.splitlines() if line.startswith(f"| Operations.{path.rpartition('/')[2]} |")]
        assert ("| freely |" in row) is repeated
        assert calls.effect_of(path) == (method_pb2.EFFECT_NONE if repeated else None)
