"""What the Go module is given beside its stubs: services with typed operations, sequences of pages, and the reasons."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tools import go_services, go_stubs, protos
from tools.paths import PROTOS
from virtfleet_service.errors import VirtfleetError

# The first test that generates waits until Go has built the generators, from nothing on a new machine.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def services() -> str:
    return (go_stubs.MODULE / "services.go").read_text()


def test_every_public_service_has_a_client(services: str) -> None:
    declared = {
        (package[1], service)
        for path in (PROTOS / "virtfleet").rglob("*.proto")
        if (package := re.search(r"^package (virtfleet\.\w+\.v1);", path.read_text(), flags=re.MULTILINE))
        and not package[1].startswith(("virtfleet.node.", "virtfleet.fake."))
        for service in re.findall(r"^service (\w+) \{", path.read_text(), flags=re.MULTILINE)
    }
    assert len(declared) > 15
    assert not {name for name in declared if f" is {name[0]}.{name[1]}.\n" not in services}


def test_operations_are_typed_and_lists_are_sequences(services: str) -> None:
    assert "func (s DomainService) StartDomain(" in services
    assert re.search(r"StartDomain\(ctx .*\) \(\*Operation\[\*computev1\.Domain\], error\)", services)
    assert re.search(r"DeleteDomain\(ctx .*\) \(\*Operation\[\*emptypb\.Empty\], error\)", services)
    assert re.search(r"AllVolumes\(ctx .*\) iter\.Seq2\[\*storagev1\.Volume, error\]", services)
    assert re.search(r"FollowResources\([^{]*\) iter\.Seq2\[\*computev1\.WatchResourcesResponse, error\]", services)


def test_every_reason_is_a_name_with_its_code() -> None:
    text = go_services.reasons()
    for branch in VirtfleetError.__subclasses__():
        for leaf in branch.__subclasses__():
            found = re.search(rf'^(Err\w+) Reason = "{leaf.reason}"$', text, flags=re.MULTILINE)
            assert found, leaf.reason
            assert f"{found[1]}: codes." in text


def test_the_committed_files_are_what_the_protos_give() -> None:
    go_stubs.check()


def test_a_file_that_differs_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "go"
    for path in go_stubs.generated(go_stubs.MODULE):
        (copy / path.relative_to(go_stubs.MODULE)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / path.relative_to(go_stubs.MODULE))
    (copy / "reasons.go").write_text("package virtfleet\n")
    (copy / "compute/v1/domain.pb.go").unlink()
    with pytest.raises(protos.ProtoError, match=r"compute/v1/domain\.pb\.go: missing\n.*reasons\.go: differs"):
        go_stubs.check(copy)
