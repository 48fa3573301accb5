"""What a soak is judged by: growth is found, and what comes and goes with the guests is none."""

from __future__ import annotations

import random

from tests.endurance.soak import Samples


def samples(*, leak: int = 0, growth_mib: float = 0.0) -> Samples:
    """Return samples of a process with up to four guests of three descriptors each."""
    chance = random.Random(1)
    made = Samples()
    for number in range(240):
        late = number >= 180
        minutes = number / 12
        made.memory_mib["n1/compute"].append((minutes, 50.0 + chance.random() + (growth_mib if late else 0)))
        # In the last quarter more guests live at once, as on a machine that others leave alone.
        guests = chance.randint(0, 4 if late else 2)
        made.descriptors["n1/compute"].append((minutes, 20.0 + 3 * guests + (leak if late else 0)))
    return made


def test_what_comes_and_goes_is_no_growth() -> None:
    assert samples().faults() == []


def test_a_process_that_was_started_again_is_found() -> None:
    made = samples()
    made.processes["n1/compute"] |= {7, 8}
    assert made.faults() == ["n1/compute: 2 processes one after the other"]


def test_one_descriptor_that_stays_is_found() -> None:
    assert samples(leak=1).faults() == ["n1/compute: descriptors 20.00, then 21.00"]


def test_memory_that_grows_is_found() -> None:
    (fault,) = samples(growth_mib=2.0).faults()
    assert fault.startswith("n1/compute: memory 50.")
