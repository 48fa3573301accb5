"""The blocking Python agent with a bug in its client: what the suite must find. `… planted_agent BUG`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests.clients.conformance import agent_speech as speech
from tests.clients.conformance import python_agent
from virtfleet_client import calls
from virtfleet_client.resource_copy import Change, ChangeKind, Copy
from virtfleet_client.watch import Resumption


def _repeats_without_request_id() -> None:
    calls.prepare = lambda path, request: (request, True)  # noqa: ARG005 - as the real one


def _repeats_what_is_unsafe() -> None:
    prepare: Callable[[str, Any], tuple[Any, bool]] = calls.prepare
    calls.prepare = lambda path, request: (prepare(path, request)[0], True)


def _repeats_once_more() -> None:
    calls.ATTEMPTS = 5


def _forgets_its_token() -> None:
    note = Resumption.note

    def forgetful(self: Resumption, answer: Any) -> None:
        note(self, answer)
        self.forget()

    Resumption.note = forgetful  # type: ignore[method-assign]  # a planted bug


def _takes_a_move_for_a_deletion() -> None:
    def move(self: Copy[Any], uid: str, name: str, told: list[Change[Any]]) -> None:
        del name
        self._drop(uid, told)

    Copy._move = move  # type: ignore[method-assign]  # a planted bug


def _loses_types() -> None:
    speech.error_of = lambda error: {"code": "UNTYPED", "message": str(error)}


def _passes_over_what_it_does_not_know() -> None:
    speech.check = lambda request: request.update(do="close") if request["do"] not in speech.FIELDS else None


def _counts_a_deletion_twice() -> None:
    take = speech.Told.take

    def twice(self: speech.Told, change: Any) -> None:
        take(self, change)
        if change.kind is ChangeKind.DELETED:
            take(self, change)

    speech.Told.take = twice  # type: ignore[method-assign]  # a planted bug


BUGS: dict[str, Callable[[], None]] = {
    "repeats-without-request-id": _repeats_without_request_id,
    "repeats-what-is-unsafe": _repeats_what_is_unsafe,
    "repeats-once-more": _repeats_once_more,
    "forgets-its-token": _forgets_its_token,
    "takes-a-move-for-a-deletion": _takes_a_move_for_a_deletion,
    "loses-types": _loses_types,
    "passes-over-what-it-does-not-know": _passes_over_what_it_does_not_know,
    "counts-a-deletion-twice": _counts_a_deletion_twice,
}

if __name__ == "__main__":
    BUGS[sys.argv[1]]()
    python_agent.run(python_agent.Agent())
