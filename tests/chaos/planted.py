"""Runs a service with a bug that the checker must find.

    python -m tests.chaos.planted BUG virtfleet_compute --config …

* `acknowledge-before-commit`: what is acknowledged reaches the store's file up to a second later.
* `dropped-event`: watchers are not told that a domain is gone.
* `forgotten-tap`: a tap stays when its port is unplugged.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

LATE_SECONDS = 1.0


def acknowledge_before_commit() -> None:
    """Have the store work on a copy, which goes into its file now and then."""
    from virtfleet_service import schema, store

    connect = schema.connect

    def elsewhere(path: Path) -> sqlite3.Connection:
        work = Path("/dev/shm") / f"virtfleet-planted-{os.getpid()}" / path.name
        if not work.exists():
            work.parent.mkdir(exist_ok=True)
            if path.exists():
                with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(work)) as new:
                    old.backup(new)
            threading.Thread(target=late, args=(work, path), daemon=True).start()
        return connect(work)

    def late(work: Path, path: Path) -> None:
        while True:
            time.sleep(LATE_SECONDS)
            with closing(sqlite3.connect(work)) as new, closing(sqlite3.connect(path)) as old:
                new.backup(old)

    schema.connect = elsewhere
    # The store would notice that it does not work on its file.
    setattr(store, "identities", lambda _path: {})  # noqa: B010 - mypy knows better than to allow it


def dropped_event() -> None:
    """Have the hub of watches forget deletions of domains."""
    from virtfleet_service import transaction, watch

    publish = watch.WatchHub._publish

    def deaf(self: Any, entries: Any) -> None:
        kept = [one for one in entries if not (one.sort == transaction.DELETE and one.kind == "domain")]
        publish(self, kept)

    watch.WatchHub._publish = deaf  # type: ignore[method-assign]  # that is the bug


def forgotten_tap() -> None:
    """Have the back end say that a link is gone while it is there."""
    from virtfleet_network.backends.bridge import backend

    async def keep(_self: Any, _network_uid: str, _link: Any) -> None:
        return

    setattr(backend.BridgeBackend, "unplug", keep)  # noqa: B010 - mypy knows better than to allow it


BUGS = {
    "acknowledge-before-commit": acknowledge_before_commit,
    "dropped-event": dropped_event,
    "forgotten-tap": forgotten_tap,
}


def main() -> None:
    """Plant the bug, then be the service."""
    bug, module, *arguments = sys.argv[1:]
    shutil.rmtree(Path("/dev/shm") / f"virtfleet-planted-{os.getpid()}", ignore_errors=True)
    BUGS[bug]()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
