"""Languages without a client of their own: stubs are generated, and short programs list the domains of a live fleet."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.fake.fleet import Fake, running
from tests.pki import Pki
from tools import protos, stubs
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2

LANGUAGES = stubs.languages()
PROGRAMS = ROOT / "tests" / "clients" / "languages"
LIMIT_SECONDS = 240

Command = list[str | Path]
Prepare = Callable[[Path, Path], Command]


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running("--nodes", "3", "--domains", "3") as fake:
        yield fake


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the stubs of every language that has a generator, as `make stubs` does."""
    folder = tmp_path_factory.mktemp("stubs")
    there = {name: folder / name for name, language in LANGUAGES.items() if language.state != "none"}
    for name, target in there.items():
        stubs.write(LANGUAGES[name], target)
    return there


def run(command: Command, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip


def built(command: Command, folder: Path) -> None:
    done = run(command, folder, {})
    assert done.returncode == 0, done.stdout + done.stderr


def ruby(made: Path, folder: Path) -> Command:
    del folder
    return ["ruby", "-I", made, PROGRAMS / "ruby" / "list_domains.rb"]


def php(made: Path, folder: Path) -> Command:
    del folder
    return ["php", PROGRAMS / "php" / "list_domains.php", made]


def node(made: Path, folder: Path) -> Command:
    modules = stubs.node_modules()
    for name in ("list_domains.ts", "tsconfig.json", "package.json"):
        shutil.copyfile(PROGRAMS / "node" / name, folder / name)
    (folder / "stubs").symlink_to(made)
    (folder / "node_modules").symlink_to(modules)
    (made / "node_modules").symlink_to(modules)
    (made / "package.json").write_text('{"type": "module"}')
    # The compiler follows links to where the stubs are: without this it would write its output around there.
    built([modules / ".bin" / "tsc", "--preserveSymlinks", "--rootDir", "."], folder)
    return ["node", folder / "dist" / "list_domains.js"]


def cpp(made: Path, folder: Path) -> Command:
    """Compile the program with the stubs that its headers lead to."""
    headers, waiting = set[str](), ["virtfleet/compute/v1/domain.grpc.pb.h", "virtfleet/compute/v1/domain.pb.h"]
    while waiting:
        header = waiting.pop()
        if header not in headers and (made / header).exists():
            headers.add(header)
            waiting += re.findall(r'^#include "(\S+\.pb\.h)"', (made / header).read_text(), flags=re.MULTILINE)
    sources = [made / f"{header[:-1]}cc" for header in sorted(headers)] + [PROGRAMS / "cpp" / "list_domains.cc"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.name}.o"
        built(["g++", "-std=c++17", "-O0", f"-I{made}", "-c", source, "-o", target], folder)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    flags = run(["pkg-config", "--libs", "grpc++", "protobuf"], folder, {}).stdout.split()
    program = folder / "list_domains"
    built(["g++", *objects, *flags, "-o", program], folder)
    return [program]


CALLED: dict[str, Prepare] = {"node": node, "ruby": ruby, "php": php, "cpp": cpp}


@pytest.mark.timeout(LIMIT_SECONDS + 60)
@pytest.mark.parametrize("name", CALLED)
def test_a_program_lists_the_domains_of_a_live_fleet(
    name: str, fake: Fake, generated: dict[str, Path], tmp_path: Path
) -> None:
    command = CALLED[name](generated[name], tmp_path)
    files = {f"VIRTFLEET_{key.upper()}": fake.ready[key] for key in ("address", "ca_file", "cert_file", "key_file")}
    listed = run(command, tmp_path, files)
    domains = fake.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-")).domains
    assert len(domains) == 9
    assert listed.stdout.splitlines() == [
        f"{domain.name} {domain_pb2.DomainState.Name(domain.status.state)}" for domain in domains
    ], listed.stderr
    # The same program with a certificate of somebody else's authority.
    foreign = Pki(tmp_path / "foreign").issue("spiffe://virtfleet.dev/user/stranger")
    strange = {"VIRTFLEET_CERT_FILE": str(foreign.certificate_file), "VIRTFLEET_KEY_FILE": str(foreign.key_file)}
    refused = run(command, tmp_path, {**files, **strange})
    assert refused.returncode == 1
    assert not refused.stdout
    assert refused.stderr


def test_the_programs_are_short() -> None:
    for name, language in LANGUAGES.items():
        if name not in CALLED:
            continue
        assert language.tried == f"tests/clients/languages/{name}"
        (program,) = PROGRAMS.glob(f"{name}/list_domains.*")
        assert len(program.read_text().splitlines()) <= 45


@pytest.mark.parametrize("name", [name for name, language in LANGUAGES.items() if language.state != "none"])
def test_the_stubs_have_every_public_message_and_service(name: str, generated: dict[str, Path]) -> None:
    language = LANGUAGES[name]
    text = "\n".join(
        path.read_text(errors="replace")
        for path in generated[name].rglob("*")
        if path.is_file() and "node_modules" not in path.parts
    )
    for file in protos.write_image(generated[name].parent / "image.binpb").file:
        if not file.name.startswith("virtfleet/") or file.name.startswith("virtfleet/node/"):
            continue
        if file.name == "virtfleet/type/v1/method.proto" and name not in ("go", "python"):
            continue
        assert not [message.name for message in file.message_type if message.name not in text], file.name
        if stubs.has_services(language):
            assert not [service.name for service in file.service if service.name not in text], file.name


def test_the_table_says_what_is_tried_and_the_page_shows_it() -> None:
    for language in LANGUAGES.values():
        assert language.state in stubs.STATES
        assert (language.state == "called") == bool(language.tried)
        assert not language.tried or (ROOT / language.tried).is_dir()
    # Those with a client of their own are called by the tests of these clients.
    called = {name for name, language in LANGUAGES.items() if language.state == "called"}
    assert called == {"go", "java", "python", *CALLED}
    page = (ROOT / "docs" / "languages.md").read_text()
    assert "\n".join(stubs.rows()) in page


def test_what_there_is_no_generator_for_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(protos.ProtoError, match="no generator for OCaml here: its generators are on opam"):
        stubs.write(LANGUAGES["ocaml"], tmp_path / "ocaml")
    assert not (tmp_path / "ocaml").exists()


def make_stubs(*language: str) -> subprocess.CompletedProcess[str]:
    # Who runs the tests by make is none of the inner one's business.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "--silent", "stubs", *language], cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )


def test_make_lists_the_languages_that_have_stubs() -> None:
    done = make_stubs()
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == [name for name, language in LANGUAGES.items() if language.state != "none"]


@pytest.mark.parametrize(
    ("language", "says"),
    [("nonsense", "there is no LANGUAGE `nonsense`: go java python"), ("ocaml", "OCaml")],
)
def test_make_says_what_it_has_no_stubs_for(language: str, says: str) -> None:
    done = make_stubs(f"LANGUAGE={language}")
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(told) == 1, done.stderr
    assert told[0].startswith("stubs: ")
    assert says in told[0]
