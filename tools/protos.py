"""Generate and check everything that is made from the `.proto` files.

    python -m tools.protos generate     stubs into protos/gen/python, image into build/image.binpb
    python -m tools.protos check        fail if the committed stubs are not what the protos give
    python -m tools.protos lint         buf lint on the image
    python -m tools.protos breaking     buf breaking against protos/baseline.binpb
    python -m tools.protos baseline     write protos/baseline.binpb (needs an ADR once it exists)

Imports come from installed packages: `google/{api,rpc,longrunning}` from the wheel of
googleapis-common-protos, `buf/validate/validate.proto` as the descriptor that the protovalidate wheel
carries, the well-known types from grpcio-tools. protoc writes one image with all of them; buf reads that.
"""

from __future__ import annotations

import argparse
import fcntl
import filecmp
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

from tools.paths import BUILD, PROTOS, ROOT

IMAGE = BUILD / "image.binpb"
BASELINE = PROTOS / "baseline.binpb"
GENERATED = PROTOS / "gen" / "python"
VALIDATE_PROTO = "buf/validate/validate.proto"
FILES_SHOWN_IN_ERRORS = 40

# The wheel of googleapis-common-protos ships this source under another name than the one its own module
# registers and every other language uses.
OPERATIONS_PROTO = "google/longrunning/operations.proto"
OPERATIONS_PROTO_OF_WHEEL = "google/longrunning/operations_proto.proto"

_INIT = '"""Generated from the protos; never edited."""\n'
_PROTOC = (sys.executable, "-m", "grpc_tools.protoc")


class ProtoError(Exception):
    """A tool of the proto chain refused its input; the text is its output."""


def _run(*arguments: str | Path, cwd: Path = ROOT) -> None:
    command = [str(argument) for argument in arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise ProtoError(said or f"{command[0]}: exit code {done.returncode}")
    if said:
        print(said, file=sys.stderr)


def run_protoc(*arguments: str) -> None:
    """Run the protoc of grpcio-tools.

    Raises:
        ProtoError: it refused its input, or one of its plugins did.
    """
    _run(*_PROTOC, *arguments)


def _script(name: str) -> Path:
    return Path(sys.executable).parent / name


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        message = f"package {name} is not installed: run `make env`"
        raise ProtoError(message)
    return Path(next(iter(spec.submodule_search_locations)))


def sources(root: Path = PROTOS) -> list[str]:
    """List the proto files of virtfleet below a folder: sorted, relative to it."""
    return sorted(path.relative_to(root).as_posix() for path in (root / "virtfleet").rglob("*.proto"))


def _validate_descriptor() -> descriptor_pb2.FileDescriptorProto:
    # The wheel has it only as a module of protobuf-py, neither as a .proto nor as a google.protobuf module.
    from protovalidate._gen.buf.validate import validate_pb

    file = descriptor_pb2.FileDescriptorProto()
    file.ParseFromString(validate_pb.desc().proto.to_binary())
    return file


def _renamed(files: descriptor_pb2.FileDescriptorSet, old: str, new: str) -> descriptor_pb2.FileDescriptorSet:
    copy = descriptor_pb2.FileDescriptorSet()
    copy.CopyFrom(files)
    for file in copy.file:
        file.name = new if file.name == old else file.name
        for index, dependency in enumerate(file.dependency):
            if dependency == old:
                file.dependency[index] = new
    return copy


def _read(path: Path) -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())


def _write(files: descriptor_pb2.FileDescriptorSet, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(files.SerializeToString(deterministic=True))


def write_imports(path: Path) -> None:
    """Write the descriptors of all foreign protos that ours may import, under their standard names."""
    common = _package_folder("google.longrunning").parent.parent
    well_known = _package_folder("grpc_tools") / "_proto"
    wanted = [
        source.relative_to(common).as_posix()
        for folder in ("google/api", "google/rpc", "google/longrunning", "google/type")
        for source in sorted((common / folder).glob("*.proto"))
    ]
    wanted += [f"google/protobuf/{source.name}" for source in sorted((well_known / "google/protobuf").glob("*.proto"))]
    include = (f"-I{common}", f"-I{well_known}")
    _run(*_PROTOC, *include, "--include_imports", f"--descriptor_set_out={path}", *wanted)
    files = _renamed(_read(path), OPERATIONS_PROTO_OF_WHEEL, OPERATIONS_PROTO)
    files.file.append(_validate_descriptor())
    _write(files, path)


def write_image(path: Path, root: Path = PROTOS) -> descriptor_pb2.FileDescriptorSet:
    """Compile the protos into one image with imports and source positions.

    Raises:
        ProtoError: protoc refused a file.
    """
    names = sources(root)
    if not names:
        message = f"no .proto files under {root / 'virtfleet'}"
        raise ProtoError(message)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        imports = Path(work) / "imports.binpb"
        write_imports(imports)
        image = Path(work) / "image.binpb"
        _run(
            *_PROTOC,
            f"-I{root}",
            f"--descriptor_set_in={imports}",
            *("--include_imports", "--include_source_info", f"--descriptor_set_out={image}"),
            *names,
        )
        files = _read(image)
    _write(files, path)
    return files


def generate_python(image: descriptor_pb2.FileDescriptorSet, target: Path) -> None:
    """Write message modules, type stubs and gRPC stubs for every file of virtfleet, and for protovalidate's rules.

    Raises:
        ProtoError: a generator failed.
    """
    names = [file.name for file in image.file if file.name.startswith("virtfleet/")]
    with_services = [file.name for file in image.file if file.name in set(names) and file.service]
    rules = [file.name for file in image.file if file.name == VALIDATE_PROTO]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        python_image = Path(work) / "image.binpb"
        _write(image, python_image)
        plugins = [f"--plugin={name}={_script(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
        protoc = (*_PROTOC, f"--descriptor_set_in={python_image}", *plugins)
        _run(*protoc, f"--python_out={target}", f"--mypy_out=quiet,readable_stubs:{target}", *names, *rules)
        if with_services:
            _run(*protoc, f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}", *with_services)
    # Generated modules hold no comments; reflection shows people these.
    (target / "virtfleet").mkdir(exist_ok=True)
    _write(_commented(image, set(names)), target / "virtfleet" / "commented.binpb")
    for folder in sorted(
        {parent for path in target.rglob("*.py") for parent in path.parents if target in parent.parents}
    ):
        (folder / "__init__.py").write_text(_INIT)
        if folder.parent == target:
            (folder / "py.typed").touch()


def _commented(image: descriptor_pb2.FileDescriptorSet, names: set[str]) -> descriptor_pb2.FileDescriptorSet:
    """Return files with nothing of their source but the comments."""
    files = descriptor_pb2.FileDescriptorSet(file=[file for file in image.file if file.name in names])
    for file in files.file:
        places = [place for place in file.source_code_info.location if place.leading_comments]
        file.ClearField("source_code_info")
        for place in places:
            # Where in the file it stands is of no use, but a location without a span is none.
            file.source_code_info.location.add(path=place.path, span=(0, 0, 0), leading_comments=place.leading_comments)
    return files


def generate() -> None:
    """Replace the generated tree by what the protos give now, and write the image.

    The old tree stays whole until the new one is complete; of two runs at a time the second waits.
    """
    GENERATED.parent.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "protos.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=GENERATED.parent) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = Path(work) / "python"
        generate_python(write_image(IMAGE), fresh)
        old = Path(work) / "old"
        if GENERATED.exists():
            GENERATED.rename(old)
        fresh.rename(GENERATED)


def differences(left: Path, right: Path) -> list[str]:
    """List what differs between two generated trees, as paths with a word of explanation."""
    names = {
        path.relative_to(tree).as_posix()
        for tree in (left, right)
        for path in tree.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = []
    for name in sorted(names):
        if not (left / name).exists():
            found.append(f"{name}: missing")
        elif not (right / name).exists():
            found.append(f"{name}: no proto makes it")
        elif not filecmp.cmp(left / name, right / name, shallow=False):
            found.append(f"{name}: differs")
    return found


def check(committed: Path = GENERATED, root: Path = PROTOS) -> None:
    """Hold the committed stubs against what the protos give now.

    Raises:
        ProtoError: they differ; names the files.
    """
    with tempfile.TemporaryDirectory() as work:
        fresh = Path(work) / "python"
        generate_python(write_image(Path(work) / "image.binpb", root), fresh)
        found = differences(committed, fresh)
    if found:
        shown = "\n  ".join(found[:FILES_SHOWN_IN_ERRORS])
        message = f"the generated stubs are out of date; run `make protos`:\n  {shown}"
        raise ProtoError(message)


def lint(root: Path = PROTOS) -> None:
    """Run `buf lint` on the protos.

    Raises:
        ProtoError: a rule is broken.
    """
    with tempfile.TemporaryDirectory() as work:
        image = Path(work) / "image.binpb"
        write_image(image, root)
        # Run elsewhere: buf would take a buf.yaml in the working directory for a module of sources.
        _run(_script("buf"), "lint", image, "--config", PROTOS / "buf.yaml", cwd=Path(work))


def breaking(baseline_image: Path = BASELINE, root: Path = PROTOS) -> None:
    """Run `buf breaking` on the protos against the committed baseline.

    Raises:
        ProtoError: a change breaks callers of the baseline, or there is no baseline.
    """
    if not baseline_image.exists():
        message = f"{baseline_image} is missing: `python -m tools.protos baseline` writes it"
        raise ProtoError(message)
    with tempfile.TemporaryDirectory() as work:
        image = Path(work) / "image.binpb"
        write_image(image, root)
        config = PROTOS / "buf.yaml"
        against = ("--against", baseline_image, "--against-config", config)
        _run(_script("buf"), "breaking", image, "--config", config, *against, cwd=Path(work))


def baseline(target: Path = BASELINE, root: Path = PROTOS) -> None:
    """Make what the protos say now the contract that `breaking` defends."""
    with tempfile.TemporaryDirectory() as work:
        image = write_image(Path(work) / "image.binpb", root)
    for file in image.file:
        file.ClearField("source_code_info")
    _write(image, target)


def main() -> int:
    """Run one action from the command line; returns the exit code."""
    actions = {"generate": generate, "check": check, "lint": lint, "breaking": breaking, "baseline": baseline}
    parser = argparse.ArgumentParser(prog="python -m tools.protos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("actions", nargs="+", choices=sorted(actions))
    for name in parser.parse_args().actions:
        try:
            actions[name]()
        except ProtoError as error:
            print(f"protos {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
