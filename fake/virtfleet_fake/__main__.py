"""The process of a fake fleet: `virtfleet-fake` or `python -m virtfleet_fake`, the same as `virtfleet fake`."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line."""
    # Imports make no garbage; `commands` looks for it again when the fleet is ready.
    gc.disable()
    from virtfleet_fake.commands import app

    try:
        app()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"virtfleet-fake: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
