"""The process of a whole node: `virtfleet-node` or `python -m virtfleet_node`.

What stands at the top of the settings file holds for all services; a table `[compute]` holds for that one alone: each
has a listener, a certificate and a store of its own. `--services storage,compute` (or `VIRTFLEET_SERVICES`) runs some
only.
"""

from __future__ import annotations

import sys

from virtfleet_node import app
from virtfleet_node.settings import NodeSettings
from virtfleet_service import logs, server
from virtfleet_service.settings import SettingsError, load


def main() -> int:
    """Read the settings and serve until told to stop; returns the exit code."""
    arguments = sys.argv[1:]
    try:
        node = load(NodeSettings, "node", argv=arguments)
        # What a flag says is for the process; services have the file and the environment.
        file = _config(arguments)
        settings = {name: load(app.SETTINGS[name], name, argv=file) for name in node.services}
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201  # there is no log yet
        return 2
    logs.configure("node", node.node, node.log_level)
    return server.main(lambda: app.running(settings))


def _config(arguments: list[str]) -> list[str]:
    """Return the flag that names the file, if there is one."""
    for index, argument in enumerate(arguments):
        if argument in ("--settings", "--config") and index + 1 < len(arguments):
            return arguments[index : index + 2]
        if argument.startswith(("--settings=", "--config=")):
            return [argument]
    return []


if __name__ == "__main__":
    sys.exit(main())
