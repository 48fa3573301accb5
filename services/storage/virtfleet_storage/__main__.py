"""Run the storage service: `python -m virtfleet_storage --config FILE`."""

from __future__ import annotations

import sys

from virtfleet_service import logs, server, settings
from virtfleet_storage import app
from virtfleet_storage.settings import StorageSettings


def main() -> int:
    """Read the settings and serve until told to stop; returns the exit code."""
    try:
        chosen = settings.load(StorageSettings, app.SERVICE, argv=sys.argv[1:])
    except settings.SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(app.SERVICE, chosen.node, chosen.log_level)
    return server.main(lambda: app.running(chosen))


if __name__ == "__main__":
    sys.exit(main())
