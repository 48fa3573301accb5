"""Generate the stubs of other languages from the image: `python -m tools.stubs` writes build/stubs/go.

Needs Go; its two generators are built once, at pinned versions, into build/go. Java's generator comes with a plugin of
Maven and reads the same protos. Python's stubs are committed: `make protos`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools import protos
from tools.paths import BUILD

TARGET = BUILD / "stubs" / "go"
GENERATORS = {
    "protoc-gen-go": "google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.6",
    "protoc-gen-go-grpc": "google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1",
}


def generators(folder: Path = BUILD / "go") -> dict[str, Path]:
    """Return Go's generators, built if they are not there yet.

    Raises:
        ProtoError: Go is missing or cannot build them.
    """
    if shutil.which("go") is None:
        message = "Go is not installed"
        raise protos.ProtoError(message)
    for name, module in GENERATORS.items():
        if not (folder / name).exists():
            print(f"building {module}")
            variables = {**os.environ, "GOBIN": str(folder)}
            done = subprocess.run(["go", "install", module], env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                raise protos.ProtoError(done.stderr.strip())
    return {name: folder / name for name in GENERATORS}


def generate_go(target: Path = TARGET) -> None:
    """Write Go's messages and gRPC stubs, in folders below the module `virtfleet.dev/go`.

    Raises:
        ProtoError: a generator is missing or failed.
    """
    image = protos.write_image(protos.IMAGE)
    names = [file.name for file in image.file if file.name.startswith("virtfleet/")]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    plugins = [f"--plugin={name}={path}" for name, path in generators().items()]
    module = "module=virtfleet.dev/go"
    outputs = [f"--go_out={module}:{target}", f"--go-grpc_out={module}:{target}"]
    protos.run_protoc(f"--descriptor_set_in={protos.IMAGE}", *plugins, *outputs, *names)


def main() -> int:
    """Generate; returns the exit code."""
    try:
        generate_go()
    except protos.ProtoError as error:
        print(f"stubs: {error}", file=sys.stderr)
        return 1
    print(f"{len(list(TARGET.rglob('*.go')))} files in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
