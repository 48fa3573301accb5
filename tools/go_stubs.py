"""The committed stubs of the Go module `clients/go`, and the thin services over them.

    python -m tools.go_stubs generate     replace what is generated in clients/go by what the protos give now
    python -m tools.go_stubs check        fail if the committed files are not that

The generators are built once, at pinned versions, into build/go. What is generated: messages and gRPC stubs
(`*/v1/*.pb.go`) of every public package, and in the module's root `services.go` and `reasons.go` (`tools.go_services`).
The package `virtfleet.node.v1` stays out: services of one node speak it among themselves.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

from tools import go_services, go_toolchain, protos
from tools.paths import BUILD, ROOT

MODULE = ROOT / "clients" / "go"
MODULE_PATH = "virtfleet.dev/go"
GENERATORS = {
    "protoc-gen-go": ("google.golang.org/protobuf/cmd/protoc-gen-go", "v1.36.12"),
    "protoc-gen-go-grpc": ("google.golang.org/grpc/cmd/protoc-gen-go-grpc", "v1.6.2"),
}
PRIVATE = "virtfleet/node/"
WRITTEN_HERE = ("services.go", "reasons.go")


def build(name: str, module: str, version: str, folder: Path = BUILD / "go") -> Path:
    """Return a program of a Go module at a pinned version, built if it is not there yet.

    Raises:
        ProtoError: There is no Go, or it cannot build it.
    """
    program = folder / version / name
    if program.exists():
        return program
    try:
        go, variables = go_toolchain.program(), go_toolchain.environment()
    except go_toolchain.GoError as error:
        raise protos.ProtoError(str(error)) from error
    print(f"building {module}@{version}")
    variables |= {"GOBIN": str(program.parent), "GOFLAGS": "-mod=mod"}
    # Outside of the module, whose go.mod would take part in the choice of versions.
    done = subprocess.run(
        [go, "install", f"{module}@{version}"], cwd="/", env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise protos.ProtoError(done.stderr.strip())
    return program


def write(target: Path, files: descriptor_pb2.FileDescriptorSet) -> None:
    """Write everything that is generated into a folder that stands for the module's root.

    Raises:
        ProtoError: a generator is missing or failed.
    """
    names = [
        file.name for file in files.file if file.name.startswith("virtfleet/") and not file.name.startswith(PRIVATE)
    ]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        image = Path(work) / "image.binpb"
        image.write_bytes(files.SerializeToString(deterministic=True))
        plugins = [f"--plugin={name}={build(name, *place)}" for name, place in GENERATORS.items()]
        outputs = [f"--{kind}_out=module={MODULE_PATH}:{target}" for kind in ("go", "go-grpc")]
        protos.run_protoc(f"--descriptor_set_in={image}", *plugins, *outputs, *names)
    public = [file for file in files.file if file.name in set(names)]
    (target / "services.go").write_text(go_services.services(public))
    (target / "reasons.go").write_text(go_services.reasons())
    _format(target)


def _format(target: Path) -> None:
    gofmt = go_toolchain.program().parent / "gofmt"
    subprocess.run([gofmt, "-w", *(target / name for name in WRITTEN_HERE)], check=True)


def generated(root: Path) -> list[Path]:
    """List the generated files below the module's root."""
    return sorted([*root.glob("*/v1/*.pb.go"), *(root / name for name in WRITTEN_HERE if (root / name).exists())])


def generate() -> None:
    """Replace the generated files; of two runs at a time the second waits."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "go_stubs.lock").open("w") as lock, tempfile.TemporaryDirectory() as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = Path(work) / "go"
        write(fresh, protos.write_image(Path(work) / "image.binpb"))
        wanted = {path.relative_to(fresh) for path in generated(fresh)}
        for path in generated(MODULE):
            if path.relative_to(MODULE) not in wanted:
                path.unlink()
        for name in wanted:
            (MODULE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fresh / name, MODULE / name)


def check(committed: Path = MODULE) -> None:
    """Hold the committed files against what the protos give now.

    Raises:
        ProtoError: they differ; names the files.
    """
    with tempfile.TemporaryDirectory() as work:
        fresh, kept = Path(work) / "fresh", Path(work) / "kept"
        write(fresh, protos.write_image(Path(work) / "image.binpb"))
        for path in generated(committed):
            copy = kept / path.relative_to(committed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        found = protos.differences(kept, fresh)
    if found:
        shown = "\n  ".join(found[: protos.FILES_SHOWN_IN_ERRORS])
        message = f"the generated files of clients/go are out of date; run `make protos`:\n  {shown}"
        raise protos.ProtoError(message)


def main() -> int:
    """Run one action from the command line; returns the exit code."""
    actions = {"generate": generate, "check": check}
    parser = argparse.ArgumentParser(prog="python -m tools.go_stubs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=sorted(actions))
    try:
        actions[parser.parse_args().action]()
    except protos.ProtoError as error:
        print(f"go_stubs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
