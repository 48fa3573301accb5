"""The process of the compute service: `virtfleet-compute` or `python -m virtfleet_compute`."""

from __future__ import annotations

import sys

from virtfleet_compute import app
from virtfleet_compute.settings import ComputeSettings
from virtfleet_service import logs, server
from virtfleet_service.settings import SettingsError, load


def main() -> int:
    """Read the settings and serve until told to stop; returns the exit code."""
    try:
        settings = load(ComputeSettings, "compute", argv=sys.argv[1:])
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201  # there is no log yet
        return 2
    logs.configure(app.SERVICE_NAME, settings.node, settings.log_level)
    return server.main(lambda: app.running(settings))


if __name__ == "__main__":
    sys.exit(main())
