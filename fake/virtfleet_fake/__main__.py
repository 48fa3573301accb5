"""The process of a fake fleet: `virtfleet-fake` or `python -m virtfleet_fake`, the same as `virtfleet fake`."""

from __future__ import annotations

import sys

from virtfleet_fake.commands import app


def main() -> None:
    """Run the command line."""
    try:
        app()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"virtfleet-fake: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
