from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from virtfleet_service.errors import (
    TRAILERS_LIMIT_BYTES,
    FieldOutOfRange,
    ResourceMoved,
    UnknownField,
    VirtfleetError,
    WrongState,
)

STORM = [(f"domain.spec.disks.{'x' * 40}{number}", "is not known to this server") for number in range(1000)]
WIDE = [(f"domain.labels.{'é' * 2000}", "é" * 2000) for _ in range(1000)]

LARGE = [
    UnknownField("unknown", field=STORM[0][0], violations=STORM),
    FieldOutOfRange("é" * 5000, field="é" * 5000, violations=WIDE, one="é" * 5000, other="\x00" * 5000),
    WrongState("%" * 5000, resource="nodes/n1/domains/" + "a" * 5000, violations=WIDE),
]


@pytest.mark.parametrize("error", LARGE, ids=lambda error: error.reason)
def test_trailers_are_never_larger_than_clients_accept(error: VirtfleetError) -> None:
    status = error.to_status()
    trailers = quote(status.message).encode() + base64.b64encode(status.SerializeToString())
    assert len(trailers) <= 8192
    info = error.details()[0]
    assert status.code == error.code.value[0]
    assert status.message
    assert type(info).__name__ == "ErrorInfo"
    assert len(status.details) == len(error.details())


def test_what_is_small_stays_whole() -> None:
    few = STORM[:20]
    status = UnknownField("unknown", field=few[0][0], violations=few).to_status()
    assert all(path.encode() in status.SerializeToString() for path, _ in few)
    name = "nodes/n2/domains/" + "a" * 200
    assert name.encode() in ResourceMoved("é" * 400, new_name=name).to_status().SerializeToString()
    assert TRAILERS_LIMIT_BYTES < 8192
