"""Where a client finds the fleet."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from virtfleet_client.contexts import ContextError, ContextFile, default_path, locate


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("ADDRESS", "CA_FILE", "CERT_FILE", "KEY_FILE", "CONTEXT"):
        monkeypatch.delenv(f"VIRTFLEET_{name}", raising=False)
    path = tmp_path / "contexts.json"
    monkeypatch.setenv("VIRTFLEET_CONTEXTS_FILE", str(path))
    return path


def write(path: Path, current: str = "lab") -> None:
    lab = {"address": "tls://fleet:7443", "ca_file": "lab/ca.crt", "cert_file": "/me.crt", "key_file": "me.key"}
    node = {"address": "unix:///run/virtfleet/compute/admin.sock", "colour": "red"}
    path.write_text(json.dumps({"current": current, "contexts": {"lab": lab, "node": node}, "later": 1}))


def test_the_current_context_is_the_last_resort(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(environment)
    found = locate()
    assert (found.name, found.address) == ("lab", "tls://fleet:7443")
    assert found.credentials is not None
    assert found.credentials.ca_file == environment.parent / "lab/ca.crt"
    assert found.credentials.certificate_file == Path("/me.crt")
    monkeypatch.setenv("VIRTFLEET_CONTEXT", "node")
    assert locate().address == "unix:///run/virtfleet/compute/admin.sock"
    monkeypatch.setenv("VIRTFLEET_ADDRESS", "unix:///other")
    assert locate().address == "unix:///other"
    assert locate(context="lab").name == "lab"
    assert locate("unix:///said").address == "unix:///said"


def test_nothing_says_where(environment: Path) -> None:
    with pytest.raises(ContextError, match="nothing says where the fleet is"):
        locate()
    write(environment, current="")
    with pytest.raises(ContextError, match="no current context"):
        locate()
    with pytest.raises(ContextError, match="known: lab, node"):
        locate(context="prod")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1, column 2"),
        ("[]", "is not an object"),
        ('{"contexts": {"a": 1}, "current": "a"}', "is not an object"),
        ('{"contexts": {"a": {}}, "current": "a"}', "has no address"),
        ('{"contexts": {"a": {"address": "tls://f:1", "ca_file": "x"}}, "current": "a"}', "needs ca_file, cert_file"),
    ],
)
def test_a_bad_file_is_an_error_and_never_an_empty_one(environment: Path, text: str, says: str) -> None:
    environment.write_text(text)
    with pytest.raises(ContextError, match=says):
        locate()


def test_a_saved_file_keeps_what_it_does_not_know(environment: Path) -> None:
    write(environment)
    file = ContextFile.load()
    file.tables["new"] = {"address": "tls://other:7443"}
    file.current = "new"
    file.save()
    document = json.loads(environment.read_text())
    assert document["later"] == 1
    assert document["contexts"]["node"]["colour"] == "red"
    assert locate().address == "tls://other:7443"
    assert stat.S_IMODE(environment.stat().st_mode) == 0o600


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTFLEET_CONTEXTS_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert default_path() == Path("/x/virtfleet/contexts.json")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert default_path() == Path("/h/.config/virtfleet/contexts.json")
