"""Fleets behind ssh: the real sshd on loopback, with keys, users and ports of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.clients.conformance import agents
from tests.clients.conformance.agents import Agent
from tests.integration.fake.fleet import Fake, running
from tools import maven
from tools.system import SEARCH_PATH
from virtfleet.common.v1 import admin_pb2, admin_pb2_grpc
from virtfleet.compute.v1 import domain_pb2

# The agents may have to be built first.
pytestmark = pytest.mark.timeout(90 + maven.LIMIT_SECONDS)

PRIVATE_ROOM = Path("/run/sshd")
"""Where root's sshd shuts in what speaks to strangers; the package makes it at boot."""


def program(name: str) -> str:
    found = shutil.which(name, path=SEARCH_PATH)
    assert found, f"{name} is missing: `make system` installs it"
    return found


@dataclass
class Sshd:
    """Is an sshd of this test, and what its callers need."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def user(self) -> str:
        return pwd.getpwuid(os.geteuid()).pw_name

    def uri(self, rest: str) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}{rest}"

    def start(self) -> None:
        command = [program("sshd"), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        ends_at = time.monotonic() + 10
        while True:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < ends_at
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except ConnectionRefusedError:
                time.sleep(0.05)

    def sessions(self) -> list[int]:
        """Return the processes of its connections."""
        assert self.process is not None
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in listed]

    def end(self) -> None:
        """End it, with its connections."""
        assert self.process is not None
        for pid in self.sessions():
            os.kill(pid, signal.SIGKILL)
        self.process.terminate()
        self.process.wait(10)

    def knows(self, name: str) -> None:
        """Have callers expect the key of that name of this host."""
        kind, key, *_ = (self.folder / f"{name}.pub").read_text().split()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def lets_in(self, name: str) -> None:
        shutil.copyfile(self.folder / f"{name}.pub", self.folder / "authorized")


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running("--nodes", "2", "--domains", "2") as fake:
        yield fake


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """Yield a server that lets one key in, and put an `ssh` on the path that knows it and has that key."""
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "me", "other"):
        subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "LogLevel VERBOSE\n"
    )
    (folder / "ssh_config").write_text(
        f"UserKnownHostsFile {folder}/known\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
        f"IdentityFile {folder}/me\nIdentitiesOnly yes\nIdentityAgent none\n"
    )
    # The program is the machine's own: only its configuration is not the user's.
    programs = folder / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {program("ssh")} -F {folder}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("VIRTFLEET_CONTEXTS_FILE", str(tmp_path / "contexts.json"))
    for name in ("VIRTFLEET_ADDRESS", "VIRTFLEET_CONTEXT", "VIRTFLEET_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    made = os.geteuid() == 0 and not PRIVATE_ROOM.exists()
    if made:
        PRIVATE_ROOM.mkdir(mode=0o755)
    server = Sshd(folder, port)
    server.knows("host")
    server.lets_in("me")
    try:
        if "persourcepenalties" in _effective(folder / "sshd_config"):
            # Since release 9.8 it hangs up on an address whose keys it has refused a few times.
            with (folder / "sshd_config").open("a") as config:
                config.write("PerSourcePenalties no\n")
        server.start()
        yield server
    finally:
        server.end()
        if made:
            PRIVATE_ROOM.rmdir()


def _effective(config: Path) -> str:
    """Return all settings that sshd would have, those that it knows and the file does not name too."""
    done = subprocess.run([program("sshd"), "-T", "-f", config], capture_output=True, text=True, check=True)
    return done.stdout


def virtfleet(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["virtfleet", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done


def context(sshd: Sshd, fake: Fake) -> None:
    """Add the gateway, as seen from the machine of the sshd."""
    files = [word for name in ("ca", "cert", "key") for word in (f"--{name}", fake.ready[f"{name}_file"])]
    uri = sshd.uri(f"?to={fake.ready['address']}&server_name=localhost")
    added = virtfleet("context", "add", uri, "--name", "far", *files)
    assert added.returncode == 0, added.stderr


def test_a_gateway_is_reached_through_ssh(sshd: Sshd, fake: Fake) -> None:
    context(sshd, fake)
    assert virtfleet("get", "nodes", "-o", "name").stdout.split() == ["nodes/n1", "nodes/n2"]
    assert "admin" in virtfleet("context", "show").stdout
    assert not sshd.sessions(), "what is left of the connections"


def test_a_service_of_a_node_is_reached_through_ssh(sshd: Sshd, environment: dict[str, str]) -> None:
    """A local socket at the other end: who may open it there has its role."""
    path = Path(environment["VIRTFLEET_CA_FILE"]).parent.parent / "n1/run/compute/admin.sock"
    assert path.is_socket()
    assert virtfleet("context", "add", sshd.uri(str(path)), "--name", "node").returncode == 0
    assert '"local:admin"' in virtfleet("api", "AccessService.WhoAmI").stdout
    assert virtfleet("get", "domains", "-n", "n1").returncode == 0


def test_the_helper_gives_a_socket_and_ends_with_its_input(sshd: Sshd, fake: Fake) -> None:
    uri = sshd.uri(f"?to={fake.ready['address']}")
    with subprocess.Popen(
        ["virtfleet", "proxy", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as helper:
        assert helper.stdin is not None
        assert helper.stdout is not None
        path = Path(helper.stdout.readline().strip())
        files = [Path(fake.ready[key]).read_bytes() for key in ("ca_file", "key_file", "cert_file")]
        options = (("grpc.ssl_target_name_override", "localhost"),)
        with grpc.secure_channel(f"unix:{path}", grpc.ssl_channel_credentials(*files), options=options) as channel:
            said = admin_pb2_grpc.AccessServiceStub(channel).WhoAmI(admin_pb2.WhoAmIRequest(), timeout=20)
            assert said.subject.startswith("spiffe://")
            assert len(sshd.sessions()) == 1
        helper.stdin.close()
        assert helper.wait(10) == 0
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("host key", "Host key verification failed"),
        ("user's key", "Permission denied (publickey)"),
        ("no server", "Connection refused"),
        ("port at the far end", "open failed: connect failed: Connection refused"),
    ],
)
def test_the_command_says_why_ssh_does_not_lead_there(sshd: Sshd, fake: Fake, wrong: str, says: str) -> None:
    context(sshd, fake)
    if wrong == "host key":
        sshd.knows("other")
    elif wrong == "user's key":
        sshd.lets_in("other")
    elif wrong == "no server":
        sshd.end()
    else:
        assert virtfleet("context", "add", sshd.uri("?to=127.0.0.1:1"), "--name", "far").returncode == 0
    started = time.monotonic()
    failed = virtfleet("--timeout", "10", "get", "nodes")
    if wrong == "no server":
        sshd.start()
    assert failed.returncode == 3, failed.stderr
    assert says in failed.stderr
    assert len(failed.stderr.splitlines()) == 1, failed.stderr
    assert time.monotonic() - started < 15


def test_a_socket_that_is_not_there_is_named(sshd: Sshd) -> None:
    failed = virtfleet("--timeout", "10", "--address", sshd.uri("/nowhere/admin.sock"), "get", "domains", "-n", "n1")
    assert failed.returncode == 3
    assert "/nowhere/admin.sock: No such file or directory" in failed.stderr


@pytest.mark.parametrize("how", ["connection", "server"])
def test_a_watch_goes_on_after_its_ssh_was_killed(sshd: Sshd, fake: Fake, tmp_path: Path, how: str) -> None:
    context(sshd, fake)
    log = tmp_path / "watch"
    with log.open("wb") as output:
        watch = subprocess.Popen(
            ["virtfleet", "watch", "domains"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        until(lambda: log.read_text().count("added") == 4, log.read_text)
        if how == "server":
            sshd.end()
            time.sleep(1)
            sshd.start()
        else:
            (session,) = sshd.sessions()
            os.kill(session, signal.SIGKILL)
        create(fake, f"after-{how}")
        until(
            lambda: f"n1/domains/after-{how}" in log.read_text() or f"n1/after-{how}" in log.read_text(), log.read_text
        )
        assert log.read_text().count("added") == 5, log.read_text()
        assert watch.poll() is None
    finally:
        watch.send_signal(signal.SIGINT)
        assert watch.wait(15) == 130
    fake.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=f"nodes/n1/domains/after-{how}"))


@pytest.fixture
def agent(request: pytest.FixtureRequest, sshd: Sshd) -> Iterator[Agent]:
    """Yield the program of a client, which finds the `ssh` of the server."""
    command = agents.AGENTS[request.param]()
    assert sshd.process is not None
    with Agent(request.param, command) as agent:
        yield agent


def through(agent: Agent, sshd: Sshd, fake: Fake) -> None:
    """Have a client connect to the gateway, as seen from the machine of the sshd."""
    files = {name: fake.ready[name] for name in ("ca_file", "cert_file", "key_file")}
    agent.call("connect", address=sshd.uri(f"?to={fake.ready['address']}&server_name=localhost"), **files)


@pytest.mark.parametrize("agent", list(agents.AGENTS), indirect=True)
def test_every_client_lists_and_watches_through_ssh(agent: Agent, sshd: Sshd, fake: Fake) -> None:
    through(agent, sshd, fake)
    assert agent.call("list", parent="nodes/-") == {"count": 4, "distinct_count": 4, "missing": []}
    agent.call("watch", **{"as": "w"}, parent="nodes/-")
    before = fake.names()[0]

    def watched(name: str) -> dict[str, Any]:
        return agent.call("watched", **{"as": "w"}, name=name)

    until(lambda: watched(before)["snapshot_ends"] == 1, agent.said)
    (session,) = sshd.sessions()
    os.kill(session, signal.SIGKILL)
    name = create(fake, f"after-{agent.name}")
    try:
        until(lambda: watched(name)["last"] is not None, agent.said)
        state = watched(name)
        assert state["snapshot_ends"] == 1, "it went on, and did not begin again"
        assert not state["ended"]
        assert session not in sshd.sessions()
    finally:
        fake.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=name))
    agent.call("close")
    until(lambda: not sshd.sessions(), agent.said)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("user's key", "Permission denied (publickey)"), ("no server", "Connection refused")],
)
@pytest.mark.parametrize("agent", list(agents.AGENTS), indirect=True)
def test_every_client_says_why_ssh_does_not_lead_there(
    agent: Agent, sshd: Sshd, fake: Fake, wrong: str, says: str
) -> None:
    if wrong == "no server":
        sshd.end()
    else:
        sshd.lets_in("other")
    try:
        through(agent, sshd, fake)
        answer = agent.begin("list", parent="nodes/-").answer(30)
    finally:
        if wrong == "no server":
            sshd.start()
    assert (answer["error"]["code"], answer["error"]["reason"]) == ("UNAVAILABLE", "")
    assert says in answer["error"]["message"]
    assert answer["error"]["message"].count(says) == 1


def create(fake: Fake, domain_id: str) -> str:
    made = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id=domain_id)
    made.domain.spec.memory.maximum_bytes = 1 << 26
    return fake.fleet.wait(fake.fleet.domains.CreateDomain(made), domain_pb2.Domain).name


def until(holds: Callable[[], bool], said: Callable[[], str], seconds: float = 30.0) -> None:
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, said()
        time.sleep(0.1)
