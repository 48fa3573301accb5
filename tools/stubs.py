"""Stubs of the API for any language that a generator exists for.

    python -m tools.stubs                 say which languages there are and what each needs
    python -m tools.stubs ruby php        write them into build/stubs/ruby and build/stubs/php, which are remade

The languages and how far each has been tried stand in `docs/data/languages.toml`. protoc, its plugins and the runtimes
of Ruby, PHP and C++ come from the distribution, and fit each other; the generator of TypeScript comes from npm, at the
versions that `tests/clients/languages/node` pins.

Other languages have no rules, permissions or routing in their stubs: these are options of the protos, whose definitions
some generators cannot read (PHP refuses all of proto2, and so `buf/validate/validate.proto`). Servers hold them anyway.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import descriptor_pb2

from tools import go_stubs, protos
from tools.paths import BUILD, ROOT

TABLE = ROOT / "docs" / "data" / "languages.toml"
STUBS = BUILD / "stubs"
NODE_PINS = ROOT / "tests" / "clients" / "languages" / "node"
NODE_MODULES = BUILD / "languages" / "node"
STATES = ("called", "generated", "none")
# Imported for what they add to options only.
_OF_OPTIONS = ("buf/validate/", "google/api/", "google/protobuf/descriptor.proto", "virtfleet/type/v1/method.proto")
_WELL_KNOWN = "google/protobuf/"
# Options of descriptor.proto that the distribution's generators are too old for.
_NEWER = ("debug_redact",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """Is a row of the table.

    Attributes:
        id: What LANGUAGE= takes.
        name: What people call it.
        state: How far it has been tried; one of STATES.
        tried: The folder of the program, or of the client, that has been tried.
        runtime: What a program needs beside the stubs, or why there is no generator.
        messages: The option of protoc that makes messages.
        services: The plugin that makes stubs of services.
        options: More options for protoc.
    """

    id: str
    name: str
    state: str
    runtime: str
    tried: str = ""
    messages: str = ""
    services: str = ""
    options: tuple[str, ...] = ()


def languages() -> dict[str, Language]:
    """Return the table, by id."""
    rows = tomllib.loads(TABLE.read_text())["language"]
    return {row["id"]: Language(**{**row, "options": tuple(row.get("options", ()))}) for row in rows}


def plain(image: descriptor_pb2.FileDescriptorSet) -> descriptor_pb2.FileDescriptorSet:
    """Return the public files and what they need, without options that other files define, and without those files."""
    kept = descriptor_pb2.FileDescriptorSet()
    for file in image.file:
        if file.name.startswith((*_OF_OPTIONS, go_stubs.PRIVATE)):
            continue
        copy = kept.file.add()
        copy.CopyFrom(file)
        dependencies = [name for name in file.dependency if not name.startswith(_OF_OPTIONS)]
        del copy.dependency[:]
        del copy.public_dependency[:]
        copy.dependency.extend(dependencies)
        del copy.extension[:]
        _strip(copy)
    return kept


def _strip(file: descriptor_pb2.FileDescriptorProto) -> None:
    waiting = list(file.message_type)
    enums = list(file.enum_type)
    for service in file.service:
        _standard_only(service)
        for method in service.method:
            _standard_only(method)
    while waiting:
        message = waiting.pop()
        _standard_only(message)
        waiting += message.nested_type
        enums += message.enum_type
        for part in (*message.field, *message.oneof_decl):
            _standard_only(part)
    for enum in enums:
        _standard_only(enum)
        for value in enum.value:
            _standard_only(value)
    _standard_only(file)


def _standard_only(element: object) -> None:
    """Drop what is not of descriptor.proto itself from the options of an element."""
    options = getattr(element, "options")  # noqa: B009 - every element has them, each of a type of its own
    for option, _ in options.ListFields():
        if option.is_extension:
            options.ClearExtension(option)
        elif option.name in _NEWER:
            options.ClearField(option.name)
    options.DiscardUnknownFields()


def _program(name: str, package: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise protos.ProtoError(f"{name} is missing: apt-get install {package}, or run `make system`")
    return Path(found)


def node_modules() -> Path:
    """Return the folder with the pinned packages of npm, installed if they are not there yet.

    Raises:
        ProtoError: There is no npm, or it cannot install them.
    """
    wanted = (NODE_PINS / "package-lock.json").read_text()
    installed = NODE_MODULES / "package-lock.json"
    modules = NODE_MODULES / "node_modules"
    if modules.exists() and installed.exists() and installed.read_text() == wanted:
        return modules
    npm = _program("npm", "npm")
    shutil.rmtree(NODE_MODULES, ignore_errors=True)
    NODE_MODULES.mkdir(parents=True)
    for name in ("package.json", ".npmrc"):
        shutil.copyfile(NODE_PINS / name, NODE_MODULES / name)
    # Written last under its own name: an installation that was interrupted is made again.
    pending = NODE_MODULES / "npm-shrinkwrap.json"
    pending.write_text(wanted)
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=NODE_MODULES, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise protos.ProtoError(done.stderr.strip() or done.stdout.strip())
    pending.rename(installed)
    return modules


def _node(target: Path, image: Path, names: list[str]) -> None:
    plugin = node_modules() / ".bin" / "protoc-gen-ts_proto"
    options = "outputServices=grpc-js,esModuleInterop=true,env=node,forceLong=bigint,importSuffix=.js,oneof=unions"
    protos.run_protoc(
        f"--descriptor_set_in={image}", f"--plugin=protoc-gen-ts_proto={plugin}",
        f"--ts_proto_out={target}", f"--ts_proto_opt={options}", *names,
    )  # fmt: skip


def _python(target: Path, image: Path, names: list[str]) -> None:
    del image, names
    shutil.copytree(protos.GENERATED, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


_OWN_WAYS: Mapping[str, Callable[[Path, Path, list[str]], None]] = {"node": _node, "python": _python}


def _by_protoc(language: Language, target: Path, image: Path, names: list[str]) -> None:
    protoc = _program("protoc", "protobuf-compiler")
    command = [str(protoc), f"--descriptor_set_in={image}", f"--{language.messages}_out={target}", *language.options]
    if language.services:
        package = "protobuf-compiler-grpc-java-plugin" if language.id == "java" else "protobuf-compiler-grpc"
        command += [f"--plugin=protoc-gen-grpc={_program(language.services, package)}", f"--grpc_out={target}"]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    if done.returncode:
        raise protos.ProtoError(done.stderr.strip())


def write(language: Language, target: Path) -> None:
    """Write the stubs of a language into a folder.

    Raises:
        ProtoError: There is no generator, it is not installed, or it failed.
    """
    if language.state == "none":
        raise protos.ProtoError(f"there is no generator for {language.name} here: {language.runtime}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        image = Path(work) / "image.binpb"
        files = protos.write_image(image)
        if language.id == "go":
            go_stubs.write(target, files)
            return
        files = plain(files)
        image.write_bytes(files.SerializeToString(deterministic=True))
        names = [file.name for file in files.file if not file.name.startswith(_WELL_KNOWN)]
        if language.id in _OWN_WAYS:
            _OWN_WAYS[language.id](target, image, names)
        else:
            _by_protoc(language, target, image, names)


def export(language: Language) -> Path:
    """Write the stubs of a language into build/stubs, all or nothing; returns the folder.

    Raises:
        ProtoError: As `write`.
    """
    target = STUBS / language.id
    STUBS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STUBS) as work:
        fresh = Path(work) / language.id
        write(language, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return target


def rows() -> list[str]:
    """Return the table of docs/languages.md, line by line."""
    lines = ["| language | `LANGUAGE=` | state | services | what a program needs |", "|---|---|---|---|---|"]
    for language in languages().values():
        name = f"[{language.name}](../{language.tried})" if language.tried else language.name
        asked = "" if language.state == "none" else f"`{language.id}`"
        services = "" if language.state == "none" else "yes" if has_services(language) else "no"
        lines.append(f"| {name} | {asked} | {language.state} | {services} | {language.runtime} |")
    return lines


def has_services(language: Language) -> bool:
    """Tell whether stubs of services are made, and not messages alone."""
    return bool(language.services) or language.id in ("go", *_OWN_WAYS)


def main() -> int:
    """Write the stubs of the languages named on the command line, or list them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.stubs")
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE")
    known = languages()
    wanted = parser.parse_args().languages
    if not wanted:
        print("make stubs LANGUAGE=…, one or more of:")
        for language in known.values():
            if language.state != "none":
                print(f"  {language.id:8} {language.name}: {language.state}; needs {language.runtime}")
        return 0
    for name in wanted:
        if name not in known:
            made = " ".join(language.id for language in known.values() if language.state != "none")
            print(f"stubs: there is no LANGUAGE `{name}`: {made}", file=sys.stderr)
            return 2
    for name in wanted:
        try:
            target = export(known[name])
        except protos.ProtoError as error:
            print(f"stubs: {error}", file=sys.stderr)
            return 1
        count = sum(len(files) for _, _, files in os.walk(target))
        print(f"{count} files in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
