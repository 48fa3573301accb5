"""The launcher's settings: a TOML file, overridden by flags."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from virtfleet_launcher.kernel import CAPABILITIES

__all__ = ["Settings", "SettingsError", "read"]

_LARGEST_ID = 2**32 - 2

_SWITCHES = {"--single-user": "single_user", "--show-settings": "show_settings", "--help": "help"}
_REPEATED = {
    "--executable": "executables",
    "--allow-root-helper": "allow_root_helpers",
    "--ambient-capability": "ambient_capabilities",
    "--openable-file": "openable_files",
    "--group": "groups",
    "--client": "clients",
}
_FLAGS = {
    "--config": "config",
    "--run-dir": "run_dir",
    "--cgroup-parent": "cgroup_parent",
    "--uids": "uids",
    "--gids": "gids",
    "--ring-bytes": "ring_bytes",
    "--log-bytes": "log_bytes",
    **_REPEATED,
}
_KINDS: dict[str, type] = {
    "single_user": bool,
    "ring_bytes": int,
    "log_bytes": int,
    "run_dir": str,
    "cgroup_parent": str,
}
_NUMBERS = ("ring_bytes", "log_bytes", "groups")
_USAGE = f"""virtfleet-launcher: parent of a node's guests and daemons

  flags: {" ".join(_FLAGS)}
  switches: {" ".join(_SWITCHES)}

--config names a TOML file with the same settings; flags win over it. --ambient-capability takes EXECUTABLE=NAME,
--uids and --gids take LOW-HIGH. These may be repeated: {" ".join(_REPEATED)}
"""


class SettingsError(Exception):
    """The settings cannot be used; the text names the one that is wrong."""


class Settings(NamedTuple):
    """What the launcher may do, and where."""

    #: Holds the sockets, the lock and below `guests/` a directory for each process.
    run_dir: str
    #: The only programs that are ever run: absolute paths, compared as text.
    executables: tuple[str, ...] = ()
    #: Those of them that may run as uid 0 because they drop it themselves (dnsmasq).
    allow_root_helpers: tuple[str, ...] = ()
    #: Capabilities that an executable may keep under a uid that is not 0.
    ambient_capabilities: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    #: Files that may be opened for a process, /dev/vhost-net for example.
    openable_files: tuple[str, ...] = ()
    #: First and last numeric id that processes may have.
    uids: tuple[int, int] = (20000, 29999)
    gids: tuple[int, int] = (20000, 29999)
    #: Supplementary groups that processes may have; unset: the group of /dev/kvm.
    groups: tuple[int, ...] | None = None
    #: No other user is possible (user namespace without extra ids, or not root): everything runs as the launcher does.
    single_user: bool = False
    #: A cgroup v2 directory that is the launcher's own; made when it is missing. Empty: no cgroups.
    cgroup_parent: str = ""
    #: One socket each; "name:uid" gives it to that user.
    clients: tuple[str, ...] = ("compute", "network")
    ring_bytes: int = 262144
    log_bytes: int = 262144

    def checked(self) -> Settings:
        """Return these settings, or refuse what could not work or would be unsafe.

        Raises:
            SettingsError: with the name of the setting.
        """
        self._check_paths()
        self._check_helpers()
        for name in ("uids", "gids"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= _LARGEST_ID:
                raise _bad(name, "must be a range above 0")
        if not self.clients or not all(re.fullmatch(r"[a-z][a-z0-9-]{0,31}(:[0-9]{1,9})?", c) for c in self.clients):
            raise _bad("clients", "must be names, each with an optional :uid")
        for name in ("ring_bytes", "log_bytes"):
            if not 4096 <= getattr(self, name) <= 64 * 1024 * 1024:
                raise _bad(name, "must be from 4 KiB to 64 MiB")
        return self

    def _check_paths(self) -> None:
        named = [("run_dir", self.run_dir), ("cgroup_parent", self.cgroup_parent or "/")]
        named += [("executables", path) for path in self.executables]
        named += [("openable_files", path) for path in self.openable_files]
        for name, path in named:
            # Compared and joined as text from here on.
            if not os.path.isabs(path) or os.path.normpath(path) != path:
                raise _bad(name, f"{path!r} is not a clean absolute path")

    def _check_helpers(self) -> None:
        for path in self.allow_root_helpers:
            if path not in self.executables:
                raise _bad("allow_root_helpers", f"{path} is not among the executables")
        for path, names in self.ambient_capabilities.items():
            if path not in self.executables:
                raise _bad("ambient_capabilities", f"{path} is not among the executables")
            if unknown := sorted(set(names) - set(CAPABILITIES)):
                raise _bad("ambient_capabilities", f"{', '.join(unknown)} is not known")

    def show(self) -> str:
        """Return the settings as JSON; there are no secrets among them."""
        return json.dumps(self._asdict() | {"ambient_capabilities": dict(self.ambient_capabilities)}, indent=2)


def _bad(name: str, message: str) -> SettingsError:
    return SettingsError(f"{name}: {message}")


def _range(name: str, value: object) -> tuple[int, int]:
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+)-([0-9]+)", value)):
        return int(match[1]), int(match[2])
    raise _bad(name, 'must be a range such as "20000-29999"')


def _texts(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _bad(name, "must be a list of strings")


def _convert(name: str, value: object) -> Any:  # noqa: ANN401 - one of the field types of Settings
    if name in ("uids", "gids"):
        return _range(name, value)
    if name == "groups":
        if isinstance(value, list) and all(isinstance(item, int) and 0 < item <= _LARGEST_ID for item in value):
            return tuple(value)
        raise _bad(name, "must be a list of numeric ids above 0")
    if name == "ambient_capabilities":
        if isinstance(value, dict):
            return {path: _texts(name, names) for path, names in value.items()}
        raise _bad(name, "must be a table")
    kind = _KINDS.get(name, tuple)
    if kind is tuple:
        return _texts(name, value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _bad(name, f"must be of type {kind.__name__}")
    return value


def _flags(arguments: list[str]) -> dict[str, Any]:
    """Return the flags by setting; without argparse, which costs as much memory as all the rest of the launcher."""
    values: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, text = argument.partition("=")
        if flag in _SWITCHES and not equals:
            values[_SWITCHES[flag]] = True
            continue
        name = _FLAGS.get(flag)
        if name is None:
            raise _bad(argument, "is not a flag; --help tells them")
        value: Any = text if equals else next(rest, None)
        if value is None:
            raise _bad(flag, "needs a value")
        if name in _NUMBERS:
            if not re.fullmatch("[0-9]{1,10}", value):
                raise _bad(name, "must be a number")
            value = int(value)
        if flag in _REPEATED:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return values


def read(arguments: list[str]) -> tuple[Settings, str]:
    """Return the settings of a command line, and the text that is to be shown instead of serving.

    Raises:
        SettingsError: a setting is unknown, missing or wrong.
    """
    flags = _flags(arguments)
    if flags.pop("help", False):
        return Settings(run_dir="/"), _USAGE
    values: dict[str, Any] = {}
    config = flags.pop("config", None)
    if config is not None:
        values.update(_file(config))
    show = flags.pop("show_settings", False)
    ambient = flags.pop("ambient_capabilities", [])
    values.update(flags)
    if ambient:
        table = {path: list(names) for path, names in values.get("ambient_capabilities", {}).items()}
        for item in ambient:
            path, _, name = item.partition("=")
            table.setdefault(path, []).append(name)
        values["ambient_capabilities"] = table
    if "run_dir" not in values:
        raise _bad("run_dir", "is missing")
    settings = Settings(**{name: _convert(name, value) for name, value in values.items()}).checked()
    return settings, settings.show() if show else ""


def _file(path: str) -> dict[str, Any]:
    # Only where there is a file: tomllib brings datetime and more.
    import tomllib

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise _bad("config", str(error)) from error
    for name in values:
        if name not in Settings._fields:
            raise _bad(name, "is not a setting")
    return values
