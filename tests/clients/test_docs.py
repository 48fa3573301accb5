"""Every block of the documentation is run as written, or says why it is not."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.clients import doc_blocks
from tests.integration.fake.fleet import Fake, running
from tests.unit.layout import tree
from tools import grpcurl
from tools.paths import ROOT
from virtfleet_cli.app import root
from virtfleet_client import contexts
from virtfleet_compute.drivers.test.settings import Settings, from_table
from virtfleet_service.authorization import Authorizer

RUN = ("quickstart", "command", "python", "grpcurl")
"""The pages of docs/ whose shell blocks run against a fake fleet of two nodes."""

PAGES = [path for path in tree.files() if path.suffix == ".md"]
HISTORY = Path("CHANGELOG.md")


def runs(page: Path) -> bool:
    return page.parent == Path("docs") and page.stem in RUN


def only_block(page: str, language: str) -> str:
    """Return the one block of a page in a language that a test of this module runs."""
    (found,) = [
        block.text
        for block in doc_blocks.blocks(ROOT / page)
        if block.language == language and block.why.startswith("tests/clients/test_docs.py")
    ]
    return found


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    grpcurl.build()
    with running("--nodes", "2", "--domains", "2") as fake:
        yield fake


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_as_it_is_written(fake: Fake, page: str, tmp_path: Path) -> None:
    said = doc_blocks.run(ROOT / "docs" / f"{page}.md", tmp_path, fake.variables)
    assert "Traceback" not in said
    # A list of the fleet may be a second behind.
    ends_at = time.monotonic() + 1
    while left := [name for name in fake.names() if "/domains/d-" not in name]:
        assert time.monotonic() < ends_at, f"the page leaves {left}"


@pytest.mark.timeout(180)
def test_the_quickstart_runs_from_the_demo_to_its_last_line(tmp_path: Path) -> None:
    """Beside what runs against the fake fleet: the demo, a fleet that is kept, and the lines that point to it."""
    demo, keep, point, *rest = [
        block for block in doc_blocks.blocks(ROOT / "docs/quickstart.md") if block.mark != "not run"
    ]
    variables = {**os.environ, "VIRTFLEET_RUN": str(tmp_path / ".run")}
    done = subprocess.run(
        ["bash", "-euc", demo.text], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Called by make, make says at the end where it is.
    (last,) = [line for line in done.stdout.splitlines()[-2:] if not line.startswith("make[")][-1:]
    assert "0 processes" in last
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    with (tmp_path / "up.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-euc", keep.text], cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        ends_at = time.monotonic() + 60
        while not (tmp_path / ".run/fleet.env").exists():
            assert process.poll() is None, (tmp_path / "up.log").read_text()
            assert time.monotonic() < ends_at, (tmp_path / "up.log").read_text()
            time.sleep(0.1)
        said = doc_blocks.run_blocks("quickstart", [point.text, *(block.text for block in rest)], tmp_path, {})
        assert "nodes/n1/domains/first created" in said
        assert "Traceback" not in said
    finally:
        # As Ctrl-C does it: to make, and to the fleet below it.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    assert "0 files are left" in (tmp_path / "up.log").read_text()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_block_is_neither_run_nor_marked(page: Path) -> None:
    silent = [
        f"{page}:{block.line}: {block.language or 'no language'}"
        for block in doc_blocks.blocks(ROOT / page)
        if doc_blocks.is_silent(block, runs=runs(page))
    ]
    assert not silent


def test_every_test_that_a_block_names_is_there_and_reads_the_page() -> None:
    named: dict[str, set[Path]] = {}
    for page in PAGES:
        for block in doc_blocks.blocks(ROOT / page):
            if block.mark == "run by":
                named.setdefault(block.why, set()).add(page)
            for path in re.findall(r"tests/[\w/.-]*\w|clients/[\w/.-]*\w", block.why.partition("::")[0]):
                assert (ROOT / path).exists(), f"{page}:{block.line}: {path}"
    files = sorted({name.partition("::")[0] for name in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert not set(named) - collected, "no such test"
    for name, pages in named.items():
        source = (ROOT / name.partition("::")[0]).read_text()
        assert not [page for page in pages if page.name not in source], f"{name} does not read the page"


def test_what_is_silent_is_seen() -> None:
    """Plants each kind of block that would get past a careless check."""
    page = (
        "# A\n\n    make demo\n\n```\nx\n```\n\n```sh\nls\n```\n\n- item\n\n  ```sh\n  ls -l\n  ```\n\n"
        "```text\n$ make up\n```\n\n<!-- not run: it is long -->\n```sh\nmake nightly\n```\n\n"
        "<!-- not run: too far away -->\n\nwords\n\n~~~toml\na = 1\n~~~\n\n```mermaid\nmake up\n```\n\n> ```sh\n> pwd\n> ```\n"
    )
    found = doc_blocks.blocks_of(page)
    texts = [block.text.strip() for block in found if doc_blocks.is_silent(block, runs=False)]
    assert texts == ["make demo", "x", "ls", "ls -l", "$ make up", "a = 1", "pwd"]
    assert [block.text.strip() for block in found if doc_blocks.is_silent(block, runs=True)] == [
        *("make demo", "x", "$ make up", "a = 1"),
    ]


def test_a_command_that_reads_its_input_takes_no_line_of_the_page(tmp_path: Path) -> None:
    assert doc_blocks.run_blocks("greedy", ["cat\n", "echo still here\n"], tmp_path, {}) == "still here\n"
    with pytest.raises(AssertionError, match="greedy"):
        doc_blocks.run_blocks("greedy", ["false | cat\n", "echo not here\n"], tmp_path, {})


# Commands in sentences and tables.


def unknown_word(line: str) -> str:
    """Return what a `virtfleet` line names that the command does not have; alternatives stand as `a|b`."""
    words = re.sub(r"[;#…].*|[\[\]]", " ", line).split()[1:]
    found: click.Command | None = root
    for number, word in enumerate(words):
        if not isinstance(found, click.Group) or word.startswith("-") or word != word.lower():
            break
        context = click.Context(found)
        missing = [name for name in word.split("|") if found.get_command(context, name) is None]
        if missing:
            return missing[0]
        found, words = found.get_command(context, word.partition("|")[0]), words[number + 1 :] or []
        return unknown_below(found, words)
    return unknown_below(found, words)


def unknown_below(command: click.Command | None, words: list[str]) -> str:
    """Return the first sub-command or option of a command that it does not have."""
    assert command is not None
    if not command.params and not isinstance(command, click.Group):
        return ""
    context = click.Context(command)
    if isinstance(command, click.Group) and words and re.fullmatch(r"[a-z|-]+", words[0]) and words[0][0] != "-":
        missing = [name for name in words[0].split("|") if command.get_command(context, name) is None]
        below = command.get_command(context, words[0].partition("|")[0])
        return missing[0] if missing else unknown_below(below, words[1:])
    if command.context_settings.get("ignore_unknown_options"):
        # Typer's: it reads its own line.
        return ""
    known = {
        option for parameter in command.get_params(context) for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= set(context.help_option_names) | {"-h"}
    given = [word.partition("=")[0] for word in words if re.match(r"-[a-z-]", word)]
    return next((option for option in given if option not in known), "")


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=str)
def test_commands_in_sentences_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wrong = []
    for line, code in doc_blocks.inline_code(ROOT / page):
        for part in code.split("; "):
            module = re.match(r"python3? -m (\S+)", part)
            if part.startswith("virtfleet ") and unknown_word(part):
                wrong.append(f"{page}:{line}: `{part}`: {unknown_word(part)}")
            elif (made := re.match(r"make ([a-z-]+)", part)) and made[1] not in targets:
                wrong.append(f"{page}:{line}: `{part}`")
            elif module and not (ROOT / module[1].replace(".", "/")).is_dir():
                path = ROOT / (module[1].replace(".", "/") + ".py")
                wrong += [] if path.exists() else [f"{page}:{line}: `{part}`"]
    assert not wrong


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("virtfleet get domains -o wide", ""),
        ("virtfleet --help", ""),
        ("virtfleet node list|token|cordon", ""),
        ("virtfleet COMMAND --help", ""),
        ("virtfleet gte domains", "gte"),
        ("virtfleet stop x --now", "--now"),
        ("virtfleet operation wiat x", "wiat"),
        ("virtfleet operation list|cancle", "cancle"),
    ],
)
def test_a_command_that_is_not_there_is_seen(line: str, unknown: str) -> None:
    assert unknown_word(line) == unknown


# Files that stand on pages.


def test_the_context_file_of_the_page_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [block.text for block in doc_blocks.blocks(ROOT / "clients/README.md") if '"contexts"' in block.text]
    path = tmp_path / "contexts.json"
    path.write_text(text)
    for name in ("ADDRESS", "CONTEXT"):
        monkeypatch.delenv(f"VIRTFLEET_{name}", raising=False)
    monkeypatch.setenv("VIRTFLEET_CONTEXTS_FILE", str(path))
    lab = contexts.locate()
    assert (lab.name, lab.address) == ("lab", "tls://fleet.example:7443")
    assert lab.credentials is not None
    assert lab.credentials.ca_file == tmp_path / "lab/ca.crt"
    assert contexts.locate(context="node").address == "ssh://me@n1.example/run/virtfleet/compute/admin.sock"


def test_the_fake_fleet_prints_what_the_page_says() -> None:
    line = only_block("docs/fake-fleet.md", "sh")
    (shown,) = [
        block.text for block in doc_blocks.blocks(ROOT / "clients/README.md") if "control_address" in block.text
    ]
    assert shlex.split(line)[:2] == ["virtfleet", "fake"]
    with running(*shlex.split(line)[2:]) as fake:
        assert set(json.loads(shown)) <= set(fake.ready)
        assert len(fake.names()) == 1_000, "a whole page"


def test_the_policy_of_the_page_binds_its_subject(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(only_block("docs/security.md", "toml"))
    judge = Authorizer()
    judge.load_policy(path)
    assert judge.bound_roles("spiffe://virtfleet.dev/user/ci") == ("operator@nodes/n1/domains/ci-",)
    assert judge.bound_roles("spiffe://virtfleet.dev/user/cia") == ()


def test_the_faults_of_the_page_are_settings_of_the_test_driver() -> None:
    table = tomllib.loads(only_block("docs/drivers.md", "toml"))["compute"]["drivers"]["test"]
    (fault,) = from_table(Settings, table, "drivers.test").faults
    assert (fault.method, fault.domains, fault.reason, fault.count) == ("start", "web-*", "HYPERVISOR_FAILED", 2)
