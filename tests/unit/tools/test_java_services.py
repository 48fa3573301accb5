"""What the Java client is given beside its stubs: a class a service with typed operations, pages and watches, and the reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import java_services
from tools.paths import PROTOS
from virtfleet_service.errors import VirtfleetError


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    return java_services.committed()


def test_every_public_service_has_a_class(committed: dict[str, str]) -> None:
    declared = {
        f"{package[1]}.{service}"
        for path in (PROTOS / "virtfleet").rglob("*.proto")
        if (package := re.search(r"^package (virtfleet\.\w+\.v1);", path.read_text(), flags=re.MULTILINE))
        and not package[1].startswith(("virtfleet.node.", "virtfleet.fake."))
        for service in re.findall(r"^service (\w+) \{", path.read_text(), flags=re.MULTILINE)
    }
    assert len(declared) > 15
    assert not {name for name in declared if f"{{@code {name}}}" not in committed["Services.java"]}
    assert len([name for name in committed if name.endswith("Service.java")]) == len(declared)


def test_operations_are_typed_lists_are_pages_and_watches_resume(committed: dict[str, str]) -> None:
    domains = committed["DomainService.java"]
    assert "public Operation<Domain> startDomain(StartDomainRequest request)" in domains
    assert "public Operation<Empty> deleteDomain(DeleteDomainRequest request)" in domains
    assert "public Pages<Domain> listDomains(ListDomainsRequest request)" in domains
    assert "public ListDomainsResponse listDomainsPage(ListDomainsRequest request)" in domains
    watch = committed["ComputeWatchService.java"]
    assert "public ResourceWatch<WatchResourcesResponse> watchResources(WatchResourcesRequest request)" in watch
    # The parts of nodes are missing from lists of what nodes have, never from the gateway's own.
    assert "ListDomainsResponse::getDomainsList, true)" in domains
    assert "ListNodesResponse::getNodesList, false)" in committed["NodeService.java"]


def test_every_reason_is_a_constant_with_its_code(committed: dict[str, str]) -> None:
    for branch in VirtfleetError.__subclasses__():
        for leaf in branch.__subclasses__():
            assert f"    {leaf.reason}(Status.Code.{branch.code.name})," in committed["Reason.java"], leaf.reason


def test_comments_are_safe_in_javadoc() -> None:
    text = "Takes `nodes/{node}` & <that>. See @here, */ and\nmore.\nWRONG_STATE: not now."
    comment = java_services.javadoc(text, "", "@return nothing")
    assert comment.splitlines() == [
        "/**",
        " * Takes {@code nodes/{node}} &amp; &lt;that&gt;. See &#64;here, *&#47; and more.",
        " *",
        " * <p>WRONG_STATE: not now.",
        " *",
        " * @return nothing",
        " */",
    ]


def test_the_committed_files_are_what_the_protos_give() -> None:
    assert java_services.differing(java_services.fresh(), java_services.committed()) == []


def test_files_that_differ_are_missing_or_are_left_over_are_named(tmp_path: Path) -> None:
    (tmp_path / "A.java").write_text(f"{java_services.HEADER}class A {{}}\n")
    (tmp_path / "Own.java").write_text("class Own {}\n")
    known = java_services.committed(tmp_path)
    assert list(known) == ["A.java"]
    assert java_services.differing({"B.java": "x"}, known) == ["A.java", "B.java"]
    assert java_services.differing({"A.java": "x"}, known) == ["A.java"]
    assert java_services.differing(known, known) == []
