"""What the `virtfleet` command is given: files, standard input and encodings, of every kind there is."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.fake.fleet import Fake, Virtfleet
from virtfleet.compute.v1 import domain_pb2


@pytest.fixture(scope="module")
def gibibyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "file"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    return path


JOIN = ("join", "--gateway", "127.0.0.1:1", "--endpoint", "compute=127.0.0.1:2", "--token-file")


@pytest.mark.parametrize(
    ("arguments", "given", "variable"),
    [
        (("create", "-f", "BIG"), "", ""),
        (("create", "-f", "-"), "BIG", ""),
        (("create", "-f", "-"), "/dev/zero", ""),
        (("apply", "-f", "/dev/zero"), "", ""),
        (("api", "GetDomain", "-d", "-"), "/dev/zero", ""),
        ((*JOIN, "BIG"), "", ""),
        ((*JOIN, "-"), "/dev/zero", ""),
        (("fake", "--seed-file", "BIG"), "", ""),
        (("fake", "--seed-file", "/dev/zero"), "", ""),
        (("context", "list"), "", "VIRTFLEET_CONTEXTS_FILE"),
        (("get", "nodes"), "", "VIRTFLEET_CA_FILE"),
        (("get", "nodes"), "", "VIRTFLEET_KEY_FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
@pytest.mark.usefixtures("fake")
def test_an_input_without_end_costs_neither_memory_nor_time(
    gibibyte: Path, arguments: tuple[str, ...], given: str, variable: str
) -> None:
    words = [str(gibibyte) if word == "BIG" else word for word in arguments]
    source = str(gibibyte) if given == "BIG" else given or os.devnull
    with open(source, "rb") as input_:  # noqa: PTH123 - a device among them
        process = subprocess.Popen(
            [sys.executable, "-m", "virtfleet_cli", *words],
            stdin=input_,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **({variable: str(gibibyte)} if variable else {})},
        )
    assert process.stderr is not None
    with process.stderr:
        said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2, said
    assert re.search(r"has more than \d+ MiB", said), said
    assert "Traceback" not in said
    assert used.ru_utime < 10
    # A child begins as a copy of the test, whose memory counts as what the child has used.
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert used.ru_maxrss < max(floor, 200 << 10) + (50 << 10), "in KiB"


@pytest.mark.parametrize(
    ("content", "says"),
    [("[" * 100_000, "is nested too deep"), (b"\xff", "byte 0 is no UTF-8"), ("{", "line 1, column 2")],
    ids=["deep", "no text", "no JSON"],
)
def test_a_context_file_that_is_none_is_told(
    virtfleet: Virtfleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, says: str
) -> None:
    file = tmp_path / "contexts"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setenv("VIRTFLEET_CONTEXTS_FILE", str(file))
    code, _, err = virtfleet("context", "list")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert str(file) in err


def test_files_that_cannot_be_read_are_named(
    virtfleet: Virtfleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert virtfleet("create", "-f", str(tmp_path)) == (2, "", f"virtfleet: {tmp_path}: Is a directory\n")
    assert virtfleet("create", "-f", "/nowhere") == (2, "", "virtfleet: /nowhere: No such file or directory\n")
    (tmp_path / "no.pem").write_text("no certificate")
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.setenv(f"VIRTFLEET_{name}_FILE", str(tmp_path / "no.pem"))
    code, _, err = virtfleet("get", "nodes")
    assert code == 2
    assert err.startswith(f"virtfleet: {tmp_path}/no.pem: holds no certificate of an authority")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("arguments", [("create", "-f"), (*JOIN,), ("fake", "--seed-file")], ids=lambda words: words[0])
def test_a_file_without_permission_is_named(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = tmp_path / "secret"
    file.touch(mode=0)
    # Without these root is held to the modes of files like anybody else.
    held = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*held, sys.executable, "-m", "virtfleet_cli", *arguments, str(file)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    # Some are told in a box, which breaks lines anywhere.
    said = re.sub(r"[│\s]+", "", done.stderr)
    assert re.search("Permissiondenied|isnotreadable", said), done.stderr
    assert str(file) in said
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("fake")
def test_who_waits_for_an_input_can_be_interrupted(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [sys.executable, "-m", "virtfleet_cli", "create", "-f", str(pipe)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        ends_at, writer = time.monotonic() + 20, -1
        while writer < 0:
            assert time.monotonic() < ends_at
            time.sleep(0.05)
            # As long as nobody reads it is no way to write to.
            with suppress(OSError):
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            os.close(writer)
    assert (process.returncode, said.strip()) == (130, "virtfleet: interrupted")


def test_what_an_encoding_has_not_is_no_fault(fake: Fake, tmp_path: Path) -> None:
    del fake
    file = tmp_path / "file.yaml"
    file.write_text("kind: domain\nname: n2/é\n")
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        for arguments, code in ((("top", "--count", "1"), 0), (("create", "-f", str(file)), 1)):
            done = subprocess.run(
                [sys.executable, "-m", "virtfleet_cli", *arguments],
                capture_output=True, timeout=30, env=environment, check=False,
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            assert b"codec" not in done.stderr


@pytest.mark.parametrize("source", ["/dev/null", "input"])
@pytest.mark.parametrize("arguments", [("proxy", "command:/bin/cat"), ("fake", "--until-eof")], ids=["proxy", "fake"])
def test_an_input_that_is_no_pipe_ends_what_lives_as_long_as_it(
    tmp_path: Path, arguments: tuple[str, ...], source: str
) -> None:
    """What starts a helper without a pipe to it (many do by default) must not get one that never ends."""
    (tmp_path / "input").write_text("a line\n")
    with (tmp_path / source).open("rb") as given:
        done = subprocess.run(
            [sys.executable, "-m", "virtfleet_cli", *arguments],
            stdin=given, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [("watch", "domains"), ("get", "domains", "-w"), ("events", "-w"), ("logs", "-f", "nodes/n1/domains/read")],
    ids=" ".join,
)
def test_what_goes_on_ends_when_nobody_reads_it_any_more(fake: Fake, arguments: tuple[str, ...]) -> None:
    """In quiet times, too, when there is nothing to write."""
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="read")
    request.domain.spec.memory.maximum_bytes = 1 << 28
    request.domain.spec.serials["ser0"].SetInParent()
    request.start.SetInParent()
    made = fake.fleet.wait(fake.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    with subprocess.Popen(
        [sys.executable, "-m", "virtfleet_cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if arguments[0] in ("watch", "get"):
            assert process.stdout.readline()
        else:
            time.sleep(2)
        assert process.poll() is None, process.stderr.read()
        process.stdout.close()
        closed = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - closed < 3
        assert process.stderr.read() == b""
    stop = domain_pb2.StopDomainRequest(name=made.name, mode=domain_pb2.STOP_MODE_FORCE)
    fake.fleet.wait(fake.fleet.domains.StopDomain(stop), domain_pb2.Domain)
    fake.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=made.name))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("arguments", [("watch", "domains"), ("get", "domains", "-w"), ("events", "-w")], ids=" ".join)
def test_a_watch_of_what_is_not_reached_fails_as_any_command_does(arguments: tuple[str, ...]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"tls://127.0.0.1:{nobody.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "virtfleet_cli", "--timeout", "2", "--address", uri, *arguments],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
