from __future__ import annotations

import pytest

from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import errors, messages
from virtfleet_service.masks import split_path
from virtfleet_service.peers import error_from_status
from virtfleet_service.validation import RequestCheck


@pytest.mark.parametrize(
    ("key", "segment"),
    [
        ("root", "root"),
        ("data-1_x", "data-1_x"),
        ("example.com/team", "`example.com/team`"),
        ("a`b", "`a``b`"),
        ("", "``"),
        ("\u00e9", "`\u00e9`"),
        (7, "7"),
        (True, "true"),
    ],
)
def test_the_key_of_a_map_stands_as_in_a_mask(key: object, segment: str) -> None:
    assert messages.key_segment(key) == segment
    assert split_path(f"labels.{segment}.x")[1] == segment if segment != "``" else True


def test_a_broken_rule_below_a_key_that_is_no_plain_word() -> None:
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web")
    request.domain.labels["example.com/team"] = "x" * 5000
    with pytest.raises(errors.InvalidArgument) as caught:
        RequestCheck(type(request), mutation=True).check(request, request.SerializeToString())
    assert caught.value.field == "domain.labels.`example.com/team`"


def test_an_error_is_told_as_in_another_request() -> None:
    error = errors.FieldConflict("no", field="volume.spec.compat", violations=[("volume.spec.compat", "a"), ("x", "b")])
    moved = error.rebased(lambda path: path.replace("volume", "new_volumes[0]") if path != "x" else "")
    assert type(moved) is errors.FieldConflict
    assert (moved.field, moved.violations) == ("new_volumes[0].spec.compat", (("new_volumes[0].spec.compat", "a"),))
    assert error.field == "volume.spec.compat", "the error itself is as it was"
    again = error_from_status(moved.to_status())
    assert (again.field, again.reason) == (moved.field, "FIELD_CONFLICT")
