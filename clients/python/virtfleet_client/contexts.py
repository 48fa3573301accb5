"""Where the fleet is: the context file, the environment, and what the program says (see `clients/README.md`)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtfleet_client import files
from virtfleet_client.endpoint import Credentials

_FILES = ("ca_file", "cert_file", "key_file")


class ContextError(ValueError):
    """Nothing says where the fleet is, or what says it cannot be used."""


@dataclass(frozen=True, slots=True)
class Context:
    """Is one fleet, or one node, with the credentials for it.

    Attributes:
        name: Its name in the context file; empty: it comes from the environment or the program.
        address: `tls://host:port`, `unix:///path`, `ssh://…`, `command:…`.
        credentials: What mutual TLS needs; None: none is spoken.
    """

    name: str
    address: str
    credentials: Credentials | None = None


def default_path() -> Path:
    """Return where the context file is."""
    named = os.environ.get("VIRTFLEET_CONTEXTS_FILE")
    if named:
        return Path(named)
    configuration = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configuration) if configuration else Path.home() / ".config") / "virtfleet" / "contexts.json"


@dataclass(slots=True)
class ContextFile:
    """Is the context file as it was read; `save` writes it back, with what this release does not know.

    Attributes:
        path: Where it is.
        document: Its whole content.
    """

    path: Path
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None = None) -> ContextFile:
        """Read the file; one that is missing has no contexts.

        Raises:
            ContextError: It does not parse, or cannot be read.
        """
        path = path if path is not None else default_path()
        try:
            document = json.loads(files.read(path).decode())
        except FileNotFoundError:
            return cls(path)
        except json.JSONDecodeError as error:
            message = f"{path}: line {error.lineno}, column {error.colno}: {error.msg}"
            raise ContextError(message) from error
        except RecursionError as error:
            message = f"{path}: is nested too deep"
            raise ContextError(message) from error
        except OSError as error:
            message = f"{path}: {error.strerror or error}"
            raise ContextError(message) from error
        except UnicodeDecodeError as error:
            message = f"{path}: byte {error.start} is no UTF-8"
            raise ContextError(message) from error
        contexts = document.get("contexts", {}) if isinstance(document, dict) else None
        if not isinstance(contexts, dict) or not all(isinstance(one, dict) for one in contexts.values()):
            message = f"{path}: is not an object with an object `contexts` of objects"
            raise ContextError(message)
        return cls(path, document)

    @property
    def current(self) -> str:
        """The name of the current context; empty: none is."""
        return str(self.document.get("current", ""))

    @current.setter
    def current(self, name: str) -> None:
        self.document["current"] = name

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The contexts as they stand in the file, by name."""
        found: dict[str, dict[str, Any]] = self.document.setdefault("contexts", {})
        return found

    def get(self, name: str) -> Context:
        """Return a context.

        Raises:
            ContextError: There is none of that name, or it is not complete.
        """
        table = self.tables.get(name)
        if table is None:
            known = ", ".join(sorted(self.tables)) or "none"
            message = f"there is no context `{name}` in {self.path} (known: {known})"
            raise ContextError(message)
        address = table.get("address")
        if not isinstance(address, str) or not address:
            message = f"{self.path}: context `{name}` has no address"
            raise ContextError(message)
        return Context(name, address, _credentials(table, self.path.parent, f"{self.path}: context `{name}`"))

    def save(self) -> None:
        """Replace the file whole; its mode is 0600.

        Raises:
            OSError: It cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as fresh:
            json.dump(self.document, fresh, indent=2)
            fresh.write("\n")
        Path(fresh.name).replace(self.path)


def _credentials(table: Mapping[str, Any], folder: Path, where: str) -> Credentials | None:
    given = {name: table[name] for name in _FILES if table.get(name)}
    if not given:
        return None
    missing = [name for name in _FILES if name not in given]
    if missing or not all(isinstance(path, str) for path in given.values()):
        message = f"{where}: needs ca_file, cert_file and key_file"
        raise ContextError(message)
    return Credentials(*(folder / given[name] for name in _FILES))


def locate(address: str = "", context: str = "", credentials: Credentials | None = None) -> Context:
    """Find the fleet: what the program says, else the environment, else the context file.

    Args:
        address: An address; empty: not said.
        context: The name of a context; empty: not said.
        credentials: For the address.

    Raises:
        ContextError: Nothing says where it is, or what does cannot be used.
    """
    environment = os.environ
    if address:
        return Context("", address, credentials or _from_environment())
    if context:
        return ContextFile.load().get(context)
    if environment.get("VIRTFLEET_ADDRESS"):
        return Context("", environment["VIRTFLEET_ADDRESS"], credentials or _from_environment())
    file = ContextFile.load()
    name = environment.get("VIRTFLEET_CONTEXT") or file.current
    if not name:
        message = (
            f"nothing says where the fleet is: VIRTFLEET_ADDRESS is not set and {file.path} has no current context; "
            "`virtfleet context add` makes one, `. .run/fleet.env` points to a development fleet"
        )
        raise ContextError(message)
    return file.get(name)


def _from_environment() -> Credentials | None:
    table = {
        "ca_file": os.environ.get("VIRTFLEET_CA_FILE"),
        "cert_file": os.environ.get("VIRTFLEET_CERT_FILE"),
        "key_file": os.environ.get("VIRTFLEET_KEY_FILE"),
    }
    return _credentials(table, Path(), "the environment (VIRTFLEET_CA_FILE, VIRTFLEET_CERT_FILE, VIRTFLEET_KEY_FILE)")
