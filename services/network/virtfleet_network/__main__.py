"""The network service as a process: `python -m virtfleet_network --settings FILE`."""

from __future__ import annotations

import sys

from virtfleet_network.app import running
from virtfleet_network.settings import NetworkSettings
from virtfleet_service import logs, server
from virtfleet_service.settings import SettingsError, load


def main(argv: list[str] | None = None) -> int:
    """Run the service until SIGTERM or SIGINT; returns the exit code: 2 for settings that cannot be used."""
    try:
        settings = load(NetworkSettings, "network", argv=sys.argv[1:] if argv is None else argv)
        if not settings.node:
            raise SettingsError("node: the id of the node is missing")
    except SettingsError as error:
        sys.stderr.write(f"virtfleet-network: {error}\n")
        return 2
    logs.configure("network", settings.node, settings.log_level)
    return server.main(lambda: running(settings))


if __name__ == "__main__":
    sys.exit(main())
