from __future__ import annotations

import pytest

from virtfleet_gateway.settings import FleetSettings
from virtfleet_service.settings import SettingsError


def test_the_lifetime_of_node_certificates_is_a_day_unless_set() -> None:
    assert FleetSettings().node_certificate_seconds == 86_400
    assert FleetSettings(node_certificate_seconds=10).node_certificate_seconds == 10


@pytest.mark.parametrize("seconds", [-1, 0, 9, 366 * 86_400 + 1])
def test_a_lifetime_that_nobody_could_renew_is_refused(seconds: int) -> None:
    with pytest.raises(SettingsError, match="node_certificate_seconds"):
        FleetSettings(node_certificate_seconds=seconds)
