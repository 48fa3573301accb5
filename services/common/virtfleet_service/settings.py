"""Settings of a server: one typed, frozen object from a TOML file, the environment and flags; the later wins.

    listen = "0.0.0.0:7443"            # for every service that reads the file
    [tls]
    certificate_file = "/etc/virtfleet/compute.crt"
    [compute]                          # for that service alone; wins over the lines above
    listen = "0.0.0.0:7444"

Every field has a flag (`--tls-certificate-file`) and a variable (`VIRTFLEET_TLS_CERTIFICATE_FILE`, and with more weight
`VIRTFLEET_COMPUTE_TLS_CERTIFICATE_FILE`). Plain dataclasses and not pydantic: it costs each process 9 MiB (ADR 0004).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from virtfleet_service import files, names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SettingsT = TypeVar("SettingsT")

PREFIX: Final = "VIRTFLEET_"
"""What the variables of the environment begin with."""

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
_MASK: Final = "********"


class SettingsError(Exception):
    """A setting is unknown, missing or has a value that it cannot have; the text names it and where it was given."""


def secret(default: str = "") -> Any:  # noqa: ANN401  # stands for a value of the field's type, as dataclasses.field does
    """Declare a setting whose value is masked wherever settings are shown."""
    return field(default=default, metadata={"secret": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Where the certificate of the process and what it trusts are found.

    Attributes:
        certificate_file: PEM, the leaf first.
        key_file: PEM, without passphrase.
        ca_file: The authorities of the fleet, PEM.
        denial_list_file: The signed denial list.
    """

    certificate_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    denial_list_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Where the gateway of the fleet is.

    Attributes:
        address: `host:port`; empty: the node is on its own.
        enrollment_address: `host:port` of its enrolment port.
    """

    address: str = ""
    enrollment_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """Where traces and metrics go; nothing is loaded for what is not set.

    Attributes:
        otlp_endpoint: `http://host:4317` of a collector, which gets traces and metrics.
        prometheus: `127.0.0.1:port` where metrics can be read.
    """

    otlp_endpoint: str = ""
    prometheus: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Is what every server has; a service adds its own by inheritance.

    Attributes:
        node: The id of the node; empty at a gateway.
        state_dir: What must survive: the store, the audit log.
        run_dir: What lives until the next boot: sockets, run directories of guests.
        listen: `host:port` for mutual TLS, or several, separated by commas; empty: local sockets only.
        trust_domain: The trust domain of the fleet.
        tls: The certificates, one file each.
        identity_dir: What `virtfleet join` has written; stands for the certificates that `tls` does not name, which are
            then renewed by the process itself.
        policy_file: Binds roles to subjects; unset: certificates and sockets alone decide.
        gateway: The gateway.
        telemetry: Traces and metrics.
        log_level: `debug`, `info`, `warning` or `error`.
        socket_group: The group that may use the sockets of operators and viewers; empty: root alone.
        drain_seconds: How long calls may run on after the process was told to stop.
        audit_limit_bytes: The size at which the audit log is renamed; one older file is kept.
        watch_memory_bytes: How much of the newest changes stays in memory for watchers; who is further behind is
            served from the store.
    """

    node: str = ""
    state_dir: Path = Path("/var/lib/virtfleet")
    run_dir: Path = Path("/run/virtfleet")
    listen: str = ""
    trust_domain: str = "virtfleet.dev"
    tls: TlsSettings = TlsSettings()
    identity_dir: Path | None = None
    policy_file: Path | None = None
    gateway: GatewaySettings = GatewaySettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    log_level: str = "info"
    socket_group: str = ""
    drain_seconds: float = 10.0
    audit_limit_bytes: int = 64 << 20
    watch_memory_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the machine.

        Raises:
            SettingsError: A value cannot be used.
        """
        if self.node and not names.is_id(self.node):
            raise SettingsError(f"node: `{self.node}` is no id: a-z, 0-9 and `-`, beginning with a letter, at most 63")
        for address in self.addresses:
            split_address(address, "listen")
        if self.telemetry.prometheus:
            split_address(self.telemetry.prometheus, "telemetry.prometheus")
        if self.log_level.lower() not in ("debug", "info", "warning", "error"):
            raise SettingsError(f"log_level: `{self.log_level}` is none of debug, info, warning, error")
        if self.drain_seconds < 0:
            raise SettingsError("drain_seconds: must not be negative")
        if self.watch_memory_bytes < 0:
            raise SettingsError("watch_memory_bytes: must not be negative")
        if self.audit_limit_bytes <= 0:
            raise SettingsError("audit_limit_bytes: must be positive")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses in `listen`."""
        return tuple(address.strip() for address in self.listen.split(",") if address.strip())


def split_address(address: str, name: str) -> tuple[str, int]:
    """Return host and port of `host:port`; an IPv6 address stands in brackets.

    Raises:
        SettingsError: It has another form; names the setting.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{name}: `{address}` is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _leaves(cls: type[Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, bool]]:
    """List path, type and secrecy of every setting of a class, parts of parts included."""
    hints = typing.get_type_hints(cls)
    found: list[tuple[tuple[str, ...], Any, bool]] = []
    for part in dataclasses.fields(cls):
        kind = hints[part.name]
        here = (*path, part.name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found += _leaves(kind, here)
        else:
            found.append((here, kind, bool(part.metadata.get("secret"))))
    return found


def _convert(text: object, kind: Any, where: str) -> Any:  # noqa: ANN401  # any type that a setting may have
    """Return a value given as text or by TOML as the type of its field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if text in ("", None) else _convert(text, inner, where)
    if origin in (tuple, list):
        items = [item for item in text.split(",") if item] if isinstance(text, str) else text
        if not isinstance(items, list):
            raise SettingsError(f"{where}: must be a list")
        return origin(_convert(item, arguments[0], where) for item in items)
    if origin is dict or kind is dict:
        if isinstance(text, str):
            try:
                text = json.loads(text)
            except ValueError as error:
                raise SettingsError(f"{where}: is not JSON") from error
        if not isinstance(text, dict):
            raise SettingsError(f"{where}: must be a table")
        return text
    return _scalar(text, kind, where)


def _scalar(text: object, kind: Any, where: str) -> Any:  # noqa: ANN401  # any scalar type that a setting may have
    if kind is bool:
        return _boolean(text, where)
    if kind in (str, Path):
        if isinstance(text, list) and kind is str and all(isinstance(item, str) for item in text):
            # The mirror of a list that is given as text.
            text = ",".join(text)
        if not isinstance(text, str):
            raise SettingsError(f"{where}: must be a string")
        return kind(text)
    if kind in (int, float):
        if isinstance(text, bool) or not isinstance(text, (int, float, str)):
            raise SettingsError(f"{where}: must be a number")
        try:
            number = kind(text)
        except (ValueError, OverflowError) as error:
            raise SettingsError(f"{where}: `{text}` is not a number") from error
        if not math.isfinite(number) or (isinstance(text, float) and number != text):
            # No limit has ever been meant by it, and half a byte is none either.
            raise SettingsError(f"{where}: `{text}` is not a {'whole' if kind is int else 'finite'} number")
        return number
    raise SettingsError(f"{where}: settings of type {kind} are not supported")


def _boolean(text: object, where: str) -> bool:
    if isinstance(text, bool):
        return text
    word = str(text).lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise SettingsError(f"{where}: `{text}` is neither true nor false")


def _from_table(
    table: Mapping[str, object], known: Mapping[tuple[str, ...], Any], where: str, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in table.items():
        here = (*path, key)
        name = ".".join(here)
        if here in known:
            found[here] = _convert(value, known[here], f"{name} in {where}")
        elif isinstance(value, dict) and any(other[: len(here)] == here for other in known):
            found |= _from_table(value, known, where, here)
        else:
            raise SettingsError(f"{name} in {where}: there is no such setting")
    return found


def _read_file(
    path: Path, known: Mapping[tuple[str, ...], Any], service: str, services: Sequence[str]
) -> dict[tuple[str, ...], Any]:
    try:
        document = tomllib.loads(files.read(path).decode())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise SettingsError(f"{path}: is nested too deep") from error
    except ValueError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from error
    # A service that is called as a setting (`node`) has no table of its own.
    own = document.pop(service, {}) if (service,) not in known else {}
    for other in services:
        # Of others: their own settings are none of ours and need not be known here.
        if (other,) not in known:
            document.pop(other, None)
    found = _from_table(document, known, str(path))
    if not isinstance(own, dict):
        raise SettingsError(f"{service} in {path}: must be a table")
    return found | _from_table(own, known, f"[{service}] of {path}")


def _build(cls: type[SettingsT], values: Mapping[tuple[str, ...], Any]) -> SettingsT:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for part in dataclasses.fields(typing.cast("type[Any]", cls)):
        kind = hints[part.name]
        if (part.name,) in values:
            arguments[part.name] = values[(part.name,)]
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            inner = {path[1:]: value for path, value in values.items() if path[0] == part.name}
            if inner:
                arguments[part.name] = _build(kind, inner)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise SettingsError(f"a setting is missing: {error}") from error


SERVICES: Final = ("compute", "storage", "network", "gateway", "launcher", "node")
"""The tables of a settings file that belong to one process each."""


def load(
    cls: type[SettingsT],
    service: str,
    *,
    argv: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> SettingsT:
    """Read the settings of a service from file, environment and flags.

    `--settings FILE` (or `VIRTFLEET_SETTINGS`) names the file. `--show-settings` prints the result, secrets masked, and
    ends the process.

    Args:
        cls: The dataclass of the settings.
        service: The name of the service: its own table in the file, its own variables.
        argv: The flags.
        environ: The environment; None: that of the process.

    Raises:
        SettingsError: Something is unknown, missing or cannot be used.
        SystemExit: The flags do not parse, or only asked for something to be printed.
    """
    environ = os.environ if environ is None else environ
    leaves = _leaves(cls)
    known = {path: kind for path, kind, _ in leaves}
    parser = argparse.ArgumentParser(prog=f"virtfleet-{service}", allow_abbrev=False)
    parser.add_argument("--settings", "--config", dest="config", type=Path, help="a TOML file with settings")
    parser.add_argument("--show-settings", action="store_true", help="print the settings in force and end")
    for path, _, hidden in leaves:
        if not hidden:
            # No flags for secrets: every user of the machine can read them in the list of processes.
            parser.add_argument("--" + "-".join(path).replace("_", "-"), dest=".".join(path), metavar="VALUE")
    flags = vars(parser.parse_args(list(argv)))
    file = flags["config"] or (Path(environ[PREFIX + "SETTINGS"]) if environ.get(PREFIX + "SETTINGS") else None)
    values: dict[tuple[str, ...], Any] = _read_file(file, known, service, SERVICES) if file is not None else {}
    for prefix in (PREFIX, f"{PREFIX}{service.upper()}_"):
        for path, kind in known.items():
            variable = prefix + "_".join(path).upper()
            if variable in environ:
                values[path] = _convert(environ[variable], kind, variable)
    for path, kind in known.items():
        given = flags.get(".".join(path))
        if given is not None:
            values[path] = _convert(given, kind, "--" + "-".join(path).replace("_", "-"))
    settings = _build(cls, values)
    if flags["show_settings"]:
        print(show(settings))  # noqa: T201  # what the flag is for
        raise SystemExit(0)
    return settings


def show(settings: object) -> str:
    """Return settings as lines `path = value`, secrets masked."""
    lines = []
    for path, _, hidden in _leaves(type(settings)):
        value: Any = settings
        for part in path:
            value = getattr(value, part)
        shown = _MASK if hidden and value else json.dumps(value, default=str)
        lines.append(f"{'.'.join(path)} = {shown}")
    return "\n".join(lines)
