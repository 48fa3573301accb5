"""The `virtfleet` command against a fleet: what people see, and how it fails."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.fake.fleet import Fake, Virtfleet
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fake.v1 import fake_pb2
from virtfleet_cli.api import methods
from virtfleet_cli.app import COMMANDS, root
from virtfleet_cli.failures import run

START = domain_pb2.StartOptions()


def test_lists_and_formats(virtfleet: Virtfleet) -> None:
    code, out, _ = virtfleet("get", "domains", "-n", "n1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["NODE", "NAME", "STATE", "VCPUS", "MEMORY", "ADDRESSES", "AGE"]
    assert lines[1].split()[:5] == ["n1", "d-00000", "RUNNING", "1", "1.0"]
    assert len(lines) == 4
    assert virtfleet("get", "vm", "-n", "n1", "-o", "name")[1].split() == [
        f"nodes/n1/domains/d-0000{number}" for number in range(3)
    ]
    document = json.loads(virtfleet("get", "domain", "n1/d-00000", "-o", "json")[1])
    assert (document["kind"], document["name"]) == ("domain", "nodes/n1/domains/d-00000")
    assert len(list(yaml.safe_load_all(virtfleet("get", "domains", "-n", "n1", "-o", "yaml")[1]))) == 3
    assert virtfleet("get", "domains", "-n", "n1", "--filter", 'status.state = "SHUT_OFF"', "-o", "name")[1] == ""


def test_a_file_is_applied_planned_and_deleted(virtfleet: Virtfleet, tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text("kind: domain\nname: n2/web\nlabels: {app: web}\nspec: {memory: {maximum_bytes: 1GiB}}\n")
    assert virtfleet("apply", "-f", str(file), "--dry-run")[1] == "nodes/n2/domains/web: create\n"
    assert virtfleet("get", "domain", "n2/web")[0] == 4
    assert virtfleet("apply", "-f", str(file))[1] == "nodes/n2/domains/web created\n"
    assert virtfleet("apply", "-f", str(file))[1] == "nodes/n2/domains/web unchanged\n"
    assert virtfleet("create", "-f", str(file))[0] == 1
    file.write_text(file.read_text().replace("app: web", "app: shop"))
    assert "labels.app: web → shop" in virtfleet("apply", "-f", str(file), "--dry-run")[1]
    assert virtfleet("apply", "-f", str(file))[1] == "nodes/n2/domains/web changed\n"
    assert virtfleet("get", "domains", "-l", "app=shop", "-o", "name")[1] == "nodes/n2/domains/web\n"
    assert virtfleet("start", "web")[:2] == (0, "nodes/n2/domains/web started\n")
    planned = virtfleet("plan", "web", "--set", "spec.cpu.vcpu_count=4")[1].splitlines()
    assert planned[1].split()[:3] == ["spec.cpu.vcpu_count", "(unset)", "4"]
    assert "at next start" in planned[1]
    code, _, err = virtfleet("delete", "domain", "web")
    assert code == 1
    assert "WRONG_STATE" in err
    assert virtfleet("delete", "domain", "-l", "app=shop", "--stop", "-y")[0] == 0


def test_who_reads_no_further_ends_the_command(fake: Fake) -> None:
    for arguments in (("get", "domains"), ("get", "domains", "-o", "yaml"), ("watch", "domains"), ("top",), ("api",)):
        process = virtfleet_process(fake, *arguments)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        with process.stderr:
            assert process.stderr.read() == "", arguments
        assert process.wait(20) == 0, arguments


def test_a_list_is_a_list_whatever_its_length(virtfleet: Virtfleet, fake: Fake) -> None:
    """What reads it must not break on the day when there is one."""
    one = ("--filter", 'name = "nodes/n1/domains/d-00000"')
    for arguments, count in (((), 3), (one, 1), (("-l", "no=such"), 0)):
        document = json.loads(virtfleet("get", "domains", "-n", "n1", "-o", "json", *arguments)[1])
        assert isinstance(document, list)
        assert len(document) == count
    assert json.loads(virtfleet("get", "domains", "n1/d-00000", "-o", "json")[1])["name"] == "nodes/n1/domains/d-00000"
    assert len(json.loads(virtfleet("get", "domains", "n1/d-00000", "n1/d-00001", "-o", "json")[1])) == 2
    fake.inject("n4", away=fake_pb2.Away())
    for output, read in (("json", json.loads), ("yaml", lambda text: list(yaml.safe_load_all(text)))):
        code, out, err = virtfleet("get", "domains", "-o", output)
        assert (code, len(read(out))) == (5, 9), "a node that is away keeps nobody from the others"
        assert "nothing new of nodes/n4" in err


def test_an_empty_table_says_so(virtfleet: Virtfleet) -> None:
    assert virtfleet("get", "networks") == (0, "", "there are no networks\n")
    assert virtfleet("get", "networks", "-o", "name") == (0, "", "")


@pytest.mark.parametrize("output", ["json", "yaml", "name", "table"])
def test_a_watch_has_the_formats_of_a_list(fake: Fake, output: str) -> None:
    process = virtfleet_process(fake, "get", "domains", "-n", "n1", "-w", "-o", output)
    assert process.stdout is not None
    try:
        if output == "json":
            lines = [json.loads(process.stdout.readline()) for _ in range(3)]
            assert {line["change"] for line in lines} == {"added"}
            assert {line["resource"]["name"] for line in lines} == {f"nodes/n1/domains/d-0000{n}" for n in range(3)}
        elif output == "yaml":
            text = process.stdout.readline()
            while "added" not in text or not text.endswith("---\n") or text == "---\n":
                text += process.stdout.readline()
            first = yaml.safe_load(text.removesuffix("---\n"))
            assert (first["change"], first["resource"]["kind"]) == ("added", "domain")
        else:
            assert "nodes/n1/domains/d-0000" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130


def test_nothing_is_deleted_unasked(virtfleet: Virtfleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script, or a pipe behind the command, is nobody who could be asked."""
    monkeypatch.setattr(sys, "stdin", None)
    seeded = {name for name in virtfleet("get", "domains", "-o", "name")[1].split() if "/d-" in name}
    code, _, err = virtfleet("delete", "domains", "--all")
    assert code == 2
    assert re.search(r"say -y to delete \d+ domains", err)
    assert seeded
    assert seeded <= set(virtfleet("get", "domains", "-o", "name")[1].split())


def test_edit_uses_the_editor(virtfleet: Virtfleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "editor"
    editor.write_text(
        f"#!{sys.executable}\nimport sys\np=sys.argv[1]\nt=open(p).read()\nopen(p,'w').write(t+'labels: {{x: y}}\\n')\n"
    )
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    code, out, _ = virtfleet("edit", "domain", "n2/d-00001")
    assert (code, out) == (0, "nodes/n2/domains/d-00001 changed: labels.x\n")
    monkeypatch.setenv("VISUAL", "true")
    assert virtfleet("edit", "domain", "n2/d-00001")[1] == "nothing was changed\n"


def test_verbs_on_many_sum_up(virtfleet: Virtfleet, fake: Fake) -> None:
    assert virtfleet("stop", "--force", "-n", "n3", "--all")[0] == 0
    fake.inject("n3", error=fake_pb2.CallError(reason="HYPERVISOR_FAILED", method_pattern="*.StartDomain", count=1))
    code, out, err = virtfleet("start", "-n", "n3", "--all")
    assert code == 5
    assert out.count("started") == 2
    assert "2 started, 1 failed" in err
    assert "HYPERVISOR_FAILED" in err
    assert virtfleet("start", "-n", "n3", "--all")[0] == 0
    assert virtfleet("start")[0] == 2
    assert virtfleet("stop", "x", "--force", "--graceful")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("get", "domain", "n1/nobody"), 4, "does not exist (RESOURCE_NOT_FOUND)"),
        (("get", "domain", "n9/x"), 4, "virtfleet node list"),
        (("get", "domain", "d-00000"), 1, "AMBIGUOUS_NAME"),
        (("get", "domians"), 2, "did you mean `domains`"),
        (("strat", "x"), 2, "there is no command `strat`; did you mean `stats` or `start`?"),
        (("frobnicate",), 2, "`virtfleet --help` lists them"),
        (("--timeout", "nan", "get", "nodes"), 2, "no number of seconds"),
        (("--timeout", "inf", "get", "nodes"), 2, "no number of seconds"),
        (("--timeout", "0", "get", "nodes"), 2, "no number of seconds"),
        (("stop", "--grace", "inf", "n1/d-00000"), 2, "no number of seconds"),
        (("operation", "wait", "x", "--seconds", "-1"), 2, "no number of seconds"),
        (("top", "--interval", "nan"), 2, "--interval"),
        (("top", "--count", "-1"), 2, "--count"),
        (("get", "domains", "--filter", "a =="), 1, "FILTER_SYNTAX"),
        (("get", "domains", "-l", "=x"), 2, "is no label"),
        (("get", "domain", "a/b/c/d"), 2, "is no name of a domain"),
        (("api", "StartDomian"), 2, "did you mean `StartDomain`"),
        (("api", "StartDomain", "-d", "{"), 2, "--data, request 1"),
        (("api", "StartDomain", "-d", '{"nmae": "x"}'), 2, "nmae"),
        (("explain", "WRONG_STAET"), 2, "did you mean `WRONG_STATE`"),
        (("explain", "domain.spec.memroy"), 2, "did you mean `memory`"),
        (("apply", "-f", "/nowhere.yaml"), 2, "No such file"),
        (("--context", "prod", "get", "domains"), 2, "there is no context `prod`"),
        (("operation", "wait", "nodes/n1/services/compute/operations/none"), 4, "RESOURCE_NOT_FOUND"),
    ],
)
def test_faults_are_a_sentence_and_an_exit_code(
    virtfleet: Virtfleet, arguments: tuple[str, ...], code: int, says: str
) -> None:
    found, _, err = virtfleet(*arguments)
    assert says in err
    assert found == code


def test_an_unreachable_fleet_is_told(virtfleet: Virtfleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTFLEET_ADDRESS", "127.0.0.1:1")
    started = time.monotonic()
    code, _, err = virtfleet("--timeout", "2", "get", "domains")
    assert code == 3
    assert "UNAVAILABLE" in err or "DEADLINE" in err
    assert time.monotonic() - started < 10
    monkeypatch.delenv("VIRTFLEET_ADDRESS")
    assert "nothing says where the fleet is" in virtfleet("get", "domains")[2]


def test_a_node_that_is_away_is_told_and_the_rest_is_shown(virtfleet: Virtfleet, fake: Fake) -> None:
    fake.inject("n4", away=fake_pb2.Away())
    code, out, err = virtfleet("get", "domains", "-o", "name")
    assert len(out.split()) == 9
    assert not any(name.startswith("nodes/n4/") for name in out.split())
    assert code == 5
    assert "the list is not whole: nothing new of nodes/n4" in err
    code, out, _ = virtfleet("get", "domains")
    assert (code, len(out.splitlines())) == (5, 10), "the table too"
    code, out, _ = virtfleet("top", "--count", "1", "--interval", "0.1")
    assert (code, len(out.splitlines())) == (0, 11)
    assert re.fullmatch(r"1 away, last seen: n4 \d+s ago", out.splitlines()[-1])
    assert "n4/" not in out
    code, out, err = virtfleet("suspend", "--all")
    assert code == 0
    assert "nothing new of nodes/n4" in err
    fake.clear()
    states = [virtfleet("get", "domain", f"{node}/d-00000", "-o", "json")[1] for node in ("n1", "n4")]
    assert [json.loads(state)["status"]["state"] for state in states] == ["DOMAIN_STATE_PAUSED", "DOMAIN_STATE_RUNNING"]
    assert virtfleet("resume", "--all")[0] == 0


def test_contexts_are_kept(virtfleet: Virtfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTFLEET_ADDRESS")
    files = [
        option
        for name, key in (("ca", "ca_file"), ("cert", "cert_file"), ("key", "key_file"))
        for option in (f"--{name}", fake.ready[key])
    ]
    assert virtfleet("context", "add", f"tls://{fake.ready['address']}", "--name", "lab", *files)[0] == 0
    assert virtfleet("context", "list")[1].startswith("* lab")
    assert "admin" in virtfleet("context", "show")[1]
    assert virtfleet("get", "nodes", "-o", "name")[1].split() == [f"nodes/n{number}" for number in range(1, 5)]
    assert virtfleet("context", "add", "tls://other:1", "--name", "other")[0] == 2
    assert virtfleet("context", "add", "ftp://other", "--name", "other")[0] == 2
    assert virtfleet("context", "use", "none")[0] == 2
    assert virtfleet("context", "remove", "lab")[0] == 0


def test_any_method_can_be_called(virtfleet: Virtfleet) -> None:
    from tests.unit.protos import descriptors

    public = {
        method.full_name for method in descriptors.methods() if descriptors.package(method) not in ("node", "fake")
    }
    assert public <= set(methods())
    answer = json.loads(virtfleet("api", "GetDomain", "-d", '{"name": "nodes/n1/domains/d-00001"}')[1])
    assert answer["name"] == "nodes/n1/domains/d-00001"
    assert (
        json.loads(virtfleet("api", "AdminService.GetServer", "-n", "n2/compute")[1])["name"]
        == "nodes/n2/services/compute"
    )
    one, *_ = virtfleet(
        "api", "virtfleet.compute.v1.ConsoleService.ReadConsoleLog", "-d", '{"name": "nodes/n1/domains/d-00001"}'
    )
    assert one == 4, "it has no port"


def test_every_command_has_help(virtfleet: Virtfleet) -> None:
    code, out, _ = virtfleet("--help")
    assert code == 0
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in out
        assert summary.split()[0] in out
        assert virtfleet(name, "--help")[0] == 0
    assert "authority" in out


def test_events_operations_stats_and_top(virtfleet: Virtfleet) -> None:
    assert virtfleet("suspend", "n1/d-00002")[0] == 0
    assert virtfleet("resume", "n1/d-00002")[0] == 0
    assert "DOMAIN_STATE_CHANGED" in virtfleet("events", "-n", "n1")[1]
    assert "SuspendDomain" in virtfleet("operation", "list", "-n", "n1")[1]
    assert "events:" in virtfleet("describe", "domain", "n1/d-00002")[1]
    assert "total_time" in virtfleet("stats", "n1/d-00000")[1]
    out = virtfleet("top", "--count", "1", "--sort", "name")[1]
    assert "n1/d-00000" in out


def virtfleet_process(fake: Fake, *arguments: str) -> subprocess.Popen[str]:
    del fake
    return subprocess.Popen(
        [sys.executable, "-m", "virtfleet_cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_ends_a_watch_quietly(fake: Fake) -> None:
    process = virtfleet_process(fake, "watch", "domains")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(12)]
    assert all("added" in line for line in lines)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip() == "virtfleet: interrupted"


def _listed(fake: Fake, *, running: bool) -> str:
    """Return the methods of operations of n4."""
    from google.longrunning import operations_pb2

    from virtfleet_client.operations import metadata_of

    request = operations_pb2.ListOperationsRequest(
        name="nodes/n4/services/compute", filter="done=false" if running else ""
    )
    answer = fake.fleet.operations.ListOperations(request)
    return " ".join(metadata_of(one).method for one in answer.operations)


def test_ctrl_c_says_what_goes_on_or_cancels(fake: Fake, tmp_path: Path) -> None:
    slow = domain_pb2.Domain()
    slow.spec.memory.maximum_bytes = 1 << 28
    slow.spec.test.power_button_delay.seconds = 60
    fake.fleet.wait(
        fake.fleet.domains.CreateDomain(
            domain_pb2.CreateDomainRequest(parent="nodes/n4", domain_id="slow", domain=slow, start=START)
        ),
        domain_pb2.Domain,
    )
    for options, says in (((), "goes on as nodes/n4/services/compute/operations/"), (("--cancel",), "cancelled")):
        process = virtfleet_process(fake, "stop", "n4/slow", "--graceful", "--grace", "50", *options)
        ends_at = time.monotonic() + 20
        while "StopDomain" not in _listed(fake, running=True):
            assert time.monotonic() < ends_at, "the operation does not begin"
            time.sleep(0.1)
        # The command has its answer two seconds after the operation has begun, and waits.
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert says in err
        if not options:
            name = err.split("goes on as ")[1].split()[0]
            assert run(root, ["operation", "cancel", name]) == 0
            while "StopDomain" in _listed(fake, running=True):
                time.sleep(0.1)
    assert run(root, ["delete", "domain", "n4/slow", "--stop"]) == 0
    del tmp_path


def test_a_console_in_a_terminal(fake: Fake) -> None:
    domain = domain_pb2.Domain()
    domain.spec.memory.maximum_bytes = 1 << 28
    domain.spec.serials["ser0"].SetInParent()
    fake.fleet.wait(
        fake.fleet.domains.CreateDomain(
            domain_pb2.CreateDomainRequest(parent="nodes/n4", domain_id="tty", domain=domain, start=START)
        ),
        domain_pb2.Domain,
    )
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "virtfleet_cli", "console", "n4/tty"], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        _until(terminal, b"connected to nodes/n4/domains/tty")
        time.sleep(1)
        os.write(terminal, b"hello\r")
        _until(terminal, b"hello")
        fake.control.CutConnections(fake_pb2.CutConnectionsRequest())
        _until(terminal, b"going on")
        time.sleep(1.5)
        os.write(terminal, b"again\r")
        _until(terminal, b"again")
        os.write(terminal, b"\x1d")
        _until(terminal, b"left")
        assert process.wait(10) == 0
    finally:
        os.close(terminal)
        if process.poll() is None:
            process.kill()
            process.wait()
    assert run(root, ["logs", "n4/tty"]) == 0
    assert run(root, ["delete", "domain", "n4/tty", "--stop"]) == 0


def _until(terminal: int, wanted: bytes, seconds: float = 20.0) -> bytes:
    seen, ends_at = b"", time.monotonic() + seconds
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, ends_at - time.monotonic()))
        assert ready, seen
        seen += os.read(terminal, 4096)
    return seen


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("line", "finds"),
    [
        ("start n1/d-0000", ["n1/d-00000", "n1/d-00001", "n1/d-00002"]),
        ("get dom", ["domains", "domain"]),
        ("get domains -n n", ["n1", "n2", "n3", "n4"]),
        ("node cordon n4", ["n4"]),
        ("context use f", ["far"]),
        ("-c f", ["far"]),
        ("explain wrong_", ["WRONG_NODE", "WRONG_STATE"]),
        ("api StartD", ["StartDomain"]),
        ("compl", ["completion"]),
        ("get domains -o n", ["name"]),
        ("get nothing x", []),
    ],
)
def test_the_shell_completes(tmp_path: Path, line: str, finds: list[str]) -> None:
    (tmp_path / "contexts.json").write_text('{"contexts": {"far": {"address": "unix:///nowhere"}}}')
    words = f"virtfleet {line}"
    environment = {**os.environ, "_VIRTFLEET_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("virtfleet"))], env=environment, capture_output=True, text=True, check=False
    )
    assert [found.partition(",")[2] for found in done.stdout.split()] == finds
    assert done.stderr == ""


def test_the_script_of_a_shell_is_printed() -> None:
    script = subprocess.run(
        [sys.executable, "-m", "virtfleet_cli", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    assert "_VIRTFLEET_COMPLETE=bash_complete" in script


def test_a_proxy_carries_any_transport(fake: Fake, tmp_path: Path) -> None:
    relay = tmp_path / "relay"
    host, _, port = fake.ready["address"].partition(":")
    relay.write_text(
        f"#!{sys.executable}\nimport os,socket,threading\ns=socket.create_connection(({host!r},{port}))\n"
        "def up():\n while d:=os.read(0,65536): s.sendall(d)\n"
        "threading.Thread(target=up,daemon=True).start()\n"
        "while d:=s.recv(65536): os.write(1,d)\n"
    )
    relay.chmod(0o755)
    code = run(root, ["--address", f"command:{relay}?server_name=localhost", "get", "nodes", "-o", "name"])
    assert code == 0


@pytest.mark.parametrize(
    "uri",
    ["ftp://x/y", "ssh://host", "command:", "command:/nowhere/program"],
    ids=["scheme", "no path", "empty", "absent"],
)
def test_a_proxy_that_cannot_be_says_why(fake: Fake, uri: str) -> None:
    process = virtfleet_process(fake, "proxy", uri)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert out == ""
    assert err
    assert "Traceback" not in err
