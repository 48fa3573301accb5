"""Settings from file, environment and flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from virtfleet_service import settings
from virtfleet_service.settings import ServiceSettings, SettingsError, TelemetrySettings, load, show


@dataclass(frozen=True, slots=True, kw_only=True)
class Own(ServiceSettings):
    count: int = 1
    ratio: float | None = None
    names: tuple[str, ...] = ()
    strict: bool = False
    password: str = settings.secret()
    table: dict[str, Any] = field(default_factory=dict)


def read(text: str, tmp_path: Path, *argv: str, environ: dict[str, str] | None = None) -> Own:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return load(Own, "compute", argv=["--settings", str(path), *argv], environ=environ or {})


def test_defaults_need_nothing() -> None:
    got = load(Own, "compute", argv=[], environ={})
    assert got == Own()
    assert got.addresses == ()


def test_what_is_given_later_wins(tmp_path: Path) -> None:
    text = 'node = "n1"\ncount = 2\n[tls]\nca_file = "/ca"\n[compute]\ncount = 3\n[storage]\nwhatever = 1\n'
    assert read(text, tmp_path).count == 3
    assert read(text, tmp_path).node == "n1"
    assert load(Own, "node", argv=["--settings", str(tmp_path / "settings.toml")], environ={}).node == "n1"
    assert read(text, tmp_path).tls.ca_file == Path("/ca")
    environ = {"VIRTFLEET_COUNT": "4"}
    assert read(text, tmp_path, environ=environ).count == 4
    environ["VIRTFLEET_COMPUTE_COUNT"] = "5"
    assert read(text, tmp_path, environ=environ).count == 5
    assert read(text, tmp_path, "--count", "6", environ=environ).count == 6
    assert read(text, tmp_path, "--tls-ca-file", "/other").tls.ca_file == Path("/other")


def test_values_of_every_type(tmp_path: Path) -> None:
    got = read(
        'ratio = 1\nnames = ["a", "b"]\nstrict = true\nlisten = ["127.0.0.1:1", "[::1]:2"]\n[table.x]\ny = 1\n',
        tmp_path,
    )
    assert (got.ratio, got.names, got.strict) == (1.0, ("a", "b"), True)
    assert got.addresses == ("127.0.0.1:1", "[::1]:2")
    assert got.table == {"x": {"y": 1}}
    environ = {
        "VIRTFLEET_NAMES": "a,b",
        "VIRTFLEET_STRICT": "off",
        "VIRTFLEET_TABLE": '{"z": 2}',
        "VIRTFLEET_RATIO": "",
    }
    got = read("strict = true", tmp_path, environ=environ)
    assert (got.names, got.strict, got.table, got.ratio) == (("a", "b"), False, {"z": 2}, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing = 1", "nothing in .*: there is no such setting"),
        ("[tls]\nnothing = 1", "tls.nothing in"),
        ("[compute]\nnothing = 1", r"nothing in \[compute\] of"),
        ('count = "many"', "count in .*: `many` is not a number"),
        ("count = true", "must be a number"),
        ("strict = 7", "neither true nor false"),
        ("listen = 7", "must be a string"),
        ("names = 7", "must be a list"),
        ("compute = 7", "must be a table"),
        ("count = ", "is not TOML"),
        ('node = "N 1"', "node: `N 1` is no id"),
        ('listen = "localhost"', "listen: `localhost` is not host:port"),
        ('listen = "a:70000"', "not host:port"),
        ('log_level = "loud"', "log_level"),
        ("drain_seconds = -1", "drain_seconds"),
        ("drain_seconds = nan", "drain_seconds in .*: `nan` is not a finite number"),
        ('drain_seconds = "inf"', "drain_seconds in .*: `inf` is not a finite number"),
        ("count = 1.5", "count in .*: `1.5` is not a whole number"),
        ("count = inf", "count in .*: `inf` is not a number"),
        ("audit_limit_bytes = 0", "audit_limit_bytes: must be positive"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read(text, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load(Own, "compute", argv=["--settings", str(tmp_path / "none.toml")], environ={})


def test_secrets_are_masked_and_have_no_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = read('password = "hunter2"', tmp_path)
    assert got.password == "hunter2"
    assert "hunter2" not in show(got)
    assert "password = ********" in show(got)
    with pytest.raises(SystemExit) as caught:
        read('password = "hunter2"', tmp_path, "--show-settings")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "hunter2" not in shown
    assert 'run_dir = "/run/virtfleet"' in shown
    with pytest.raises(SystemExit):
        read("", tmp_path, "--password", "x")


def test_parts_of_parts_are_settings_too() -> None:
    got = load(Own, "compute", argv=["--telemetry-prometheus", "127.0.0.1:9"], environ={})
    assert got.telemetry == TelemetrySettings(prometheus="127.0.0.1:9")
