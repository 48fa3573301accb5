"""A caller in a process of its own: changes resources without pause and writes down, with fsync, what it was told.

    python -m tests.chaos.writer RECORD TAG SEED KIND     # the fleet from the environment; ends with its standard input

One line of JSON before each call (`intent`) and one behind it (`ack`, `failed`); `again` where an answer was lost and the
call is made again with the same request_id. What has failed for good is tried again as a new change, as a controller
would. Each thread leads resources of one kind through their lives (`lives.py`); KIND says which it needs.
"""

from __future__ import annotations

import random
import sys
import threading

from tests.chaos.caller import Record
from tests.chaos.lives import lives_of
from virtfleet_client import connect


def main() -> None:
    """Run until standard input ends, then finish what was begun."""
    path, tag, seed, kind = sys.argv[1:]
    stop = threading.Event()
    with open(path, "a", encoding="utf-8") as file, connect() as fleet:  # noqa: PTH123 - appended to
        record = Record(file)
        callers = [
            life(fleet, record, f"{tag}-{number}", stop, random.Random(f"{seed}/{number}"))
            for number, life in enumerate(lives_of(kind))
        ]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()
        record.write(say="end")


if __name__ == "__main__":
    main()
