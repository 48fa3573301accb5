"""The gateway as a process: `virtfleet-gateway --settings FILE`."""

from __future__ import annotations

import sys

from virtfleet_gateway.app import running
from virtfleet_gateway.settings import FleetSettings
from virtfleet_service import logs, server
from virtfleet_service.settings import SettingsError, load


def main(argv: list[str] | None = None) -> int:
    """Run the gateway until SIGTERM or SIGINT; returns the exit code: 2 for settings that cannot be used."""
    try:
        settings = load(FleetSettings, "gateway", argv=sys.argv[1:] if argv is None else argv)
    except SettingsError as error:
        sys.stderr.write(f"virtfleet-gateway: {error}\n")
        return 2
    logs.configure("gateway", "", settings.log_level)
    return server.main(lambda: running(settings))


if __name__ == "__main__":
    sys.exit(main())
