"""The legal states of pools and volumes, as tables; the only judge of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_service.errors import BY_REASON, ImageCorrupt, WrongState

INACTIVE = pool_pb2.POOL_STATE_INACTIVE
BUILDING = pool_pb2.POOL_STATE_BUILDING
RUNNING = pool_pb2.POOL_STATE_RUNNING
DEGRADED = pool_pb2.POOL_STATE_DEGRADED
INACCESSIBLE = pool_pb2.POOL_STATE_INACCESSIBLE

POOL_VERBS: Mapping[str, frozenset[int]] = MappingProxyType(
    {
        "start": frozenset({INACTIVE, INACCESSIBLE, RUNNING, DEGRADED}),
        "stop": frozenset({INACTIVE, INACCESSIBLE, RUNNING, DEGRADED}),
        "refresh": frozenset({RUNNING, DEGRADED}),
        "delete": frozenset({INACTIVE, INACCESSIBLE, RUNNING, DEGRADED}),
        "update": frozenset({INACTIVE, INACCESSIBLE, RUNNING, DEGRADED}),
        "use": frozenset({RUNNING, DEGRADED}),
    }
)
"""Verb → the states of a pool in which it means something."""


def check_pool(pool: pool_pb2.Pool, verb: str) -> None:
    """Accept a verb in the present state of a pool.

    Raises:
        WrongState: It means nothing now: metadata `state`.
    """
    state = pool.status.state
    if state not in POOL_VERBS[verb]:
        word = pool_pb2.PoolState.Name(state).removeprefix("POOL_STATE_")
        raise WrongState(f"{pool.name} is {word}: it cannot {verb} now", resource=pool.name, state=word, verb=verb)


def check_volume(volume: volume_pb2.Volume) -> None:
    """Accept a volume that may be read and given to guests.

    Raises:
        VirtfleetError: That for which it is refused: BACKING_MISSING, PATH_OUTSIDE_POOL, IMAGE_CORRUPT,
        CAPABILITY_MISSING.
    """
    status = volume.status
    if status.state == volume_pb2.VOLUME_STATE_READY:
        return
    said = next((one.message for one in status.conditions if one.type == "Refused"), "it is not usable")
    kind = BY_REASON.get(status.state_reason, ImageCorrupt)
    raise kind(f"{volume.name} is not given out: {said}", resource=volume.name, path=status.path)
