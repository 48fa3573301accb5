"""The proto chain makes importable stubs and refuses what it should refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import protos

PROTO = """\
syntax = "proto3";

package virtfleet.sample.v1;

import "buf/validate/validate.proto";
import "google/api/resource.proto";
import "google/longrunning/operations.proto";

option go_package = "virtfleet.dev/go/sample/v1;samplev1";
option java_multiple_files = true;
option java_package = "dev.virtfleet.sample.v1";

// Serves samples.
service SampleService {
  // Starts a sample.
  rpc StartSample(StartSampleRequest) returns (google.longrunning.Operation);
}

// Asks for a start.
message StartSampleRequest {
  // The sample.
  string name = 1 [
    (buf.validate.field).string.pattern = "^nodes/[a-z0-9-]+$",
    (google.api.resource_reference).type = "virtfleet.dev/Sample"
  ];
}
"""
USE = """\
import protovalidate
from virtfleet.sample.v1 import sample_pb2, sample_pb2_grpc
from buf.validate import validate_pb2
rules = sample_pb2.StartSampleRequest.DESCRIPTOR.fields_by_name["name"].GetOptions().Extensions[validate_pb2.field]
protovalidate.validate(sample_pb2.StartSampleRequest(name="nodes/a"))
bad = protovalidate.collect_violations(sample_pb2.StartSampleRequest(name="x"))
print(rules.string.pattern, len(bad), sample_pb2_grpc.SampleServiceStub.__name__)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "protos/virtfleet/sample/v1"
    folder.mkdir(parents=True)
    (folder / "sample.proto").write_text(PROTO)
    return tmp_path / "protos"


def change(root: Path, old: str, new: str) -> None:
    path = root / "virtfleet/sample/v1/sample.proto"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_stubs_are_importable_and_their_rules_are_enforced(root: Path, tmp_path: Path) -> None:
    protos.generate_python(protos.write_image(tmp_path / "image.binpb", root), tmp_path / "python")
    # A process of its own: the descriptors must not reach this one's pool. -P: the tree's own stubs stay out of the way.
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'python')!r})\n{USE}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["^nodes/[a-z0-9-]+$", "1", "SampleServiceStub"], "")


def test_generation_is_deterministic_and_drift_is_seen(root: Path, tmp_path: Path) -> None:
    committed = tmp_path / "python"
    protos.generate_python(protos.write_image(tmp_path / "image.binpb", root), committed)
    first = (tmp_path / "image.binpb").read_bytes()
    protos.write_image(tmp_path / "image.binpb", root)
    assert (tmp_path / "image.binpb").read_bytes() == first
    protos.check(committed, root)
    (committed / "virtfleet/sample/v1/stray_pb2.py").touch()
    change(root, "string name = 1", "string title = 9;\n  // The sample.\n  string name = 1")
    with pytest.raises(protos.ProtoError, match=r"sample_pb2\.py: differs\n.*\n.*stray_pb2\.py: no proto makes it"):
        protos.check(committed, root)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("// The sample.\n", "\n", "should have a non-empty comment"),
        ("string name", "string Name", "lower_snake_case"),
        ("service SampleService", "service Sample", 'suffixed with "Service"'),
        ("(StartSampleRequest) returns", "(google.longrunning.Operation) returns", "StartSampleRequest"),
    ],
)
def test_lint_refuses(root: Path, old: str, new: str, said: str) -> None:
    protos.lint(root)
    change(root, old, new)
    with pytest.raises(protos.ProtoError, match=said):
        protos.lint(root)


@pytest.mark.parametrize(
    ("old", "new"),
    [("string name = 1", "string name = 2"), ("string name", "bytes name"), ("rpc StartSample(", "rpc StartASample(")],
)
def test_breaking_change_is_refused_and_an_addition_is_not(root: Path, tmp_path: Path, old: str, new: str) -> None:
    baseline = tmp_path / "baseline.binpb"
    with pytest.raises(protos.ProtoError, match="missing"):
        protos.breaking(baseline, root)
    protos.baseline(baseline, root)
    change(
        root,
        "\n}\n\n// Asks",
        "\n  // Ends a sample.\n  rpc EndSample(StartSampleRequest) returns (StartSampleRequest);\n}\n\n// Asks",
    )
    protos.breaking(baseline, root)
    change(root, old, new)
    with pytest.raises(protos.ProtoError, match=r"Previously present|changed type"):
        protos.breaking(baseline, root)


def test_syntax_errors_are_told(root: Path, tmp_path: Path) -> None:
    change(root, "string name = 1", "string name = ")
    with pytest.raises(protos.ProtoError, match=r"sample\.proto:22"):
        protos.write_image(tmp_path / "image.binpb", root)
