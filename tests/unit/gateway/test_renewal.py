"""When a member renews: at half of its certificate's life, counted from when it got it."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

import pytest

from virtfleet_gateway.authority import Authority, new_request
from virtfleet_service.enrollment import Membership


def planned(folder: Path) -> float:
    """Return in how many seconds a member that starts now renews."""
    member = Membership(folder, "compute", changed=lambda: None, note=lambda _: None)
    return member._renew_at.timestamp() - time.time()


@pytest.fixture
def issue(tmp_path: Path) -> Path:
    """Write a certificate of twenty minutes; it begins five minutes before it was issued."""
    request = new_request("compute")[1]
    issued = Authority.create(tmp_path / "ca").issue_node(request, "n1", "compute", dt.timedelta(minutes=20))
    (tmp_path / "compute.crt").write_bytes(issued.pem)
    return tmp_path


def test_half_of_the_life_counts_from_the_receipt(issue: Path) -> None:
    for _ in range(20):
        assert 60 * 8.5 < planned(issue) < 60 * 11.5


def test_a_certificate_with_an_impossible_time_of_receipt_is_renewed_early(issue: Path) -> None:
    file = issue / "compute.crt"
    for written in (time.time() + 86_400, time.time() - 86_400):
        os.utime(file, (written, written))
        # Half of the twenty-five minutes from its beginning.
        assert 60 * 5.5 < planned(issue) < 60 * 9


def test_what_has_passed_since_the_receipt_counts(issue: Path) -> None:
    file = issue / "compute.crt"
    written = time.time() - 4 * 60
    os.utime(file, (written, written))
    assert 60 * 6.5 < planned(issue) < 60 * 9.5
