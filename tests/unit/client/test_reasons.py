"""The catalogue of reasons: complete, and of one form."""

from __future__ import annotations

from virtfleet_client.reasons import catalogue
from virtfleet_service import errors


def test_every_reason_has_an_entry_and_no_other() -> None:
    assert set(catalogue()) == set(errors.BY_REASON)


def test_entries_are_whole_sentences() -> None:
    for reason in catalogue().values():
        for text in (reason.means, reason.cause, reason.remedy):
            assert text[0].isupper() or text[0] == "`", reason
            assert text.endswith((".", "`.")), reason
        assert reason.retry in {"no", "same", "changed"}


def test_what_may_be_repeated_agrees_with_the_servers() -> None:
    # A final error is remembered with its request_id: the same call gets it again.
    for name, reason in catalogue().items():
        if reason.retry == "same":
            assert not errors.BY_REASON[name].final, name
