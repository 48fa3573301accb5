"""Marks, tables and files of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.figures import TARGETS, Failure, Figure, Target
from bench.legs import LEGS, PEER, chosen

MET = Figure("gateway_over_direct_p50", 2.5, "ratio", 100, "through the gateway")
MISSED = Figure("gateway_over_direct_throughput", 0.2, "ratio", 8)
RAW = Figure("direct_p50_us", 412.3, "µs", 100)


def run(*figures: Figure, failures: tuple[Failure, ...] = ()) -> report.Run:
    machine = {
        "cpu_count": 2,
        "cpu_model": "test",
        "memory_mib": 1,
        "system": "here",
        "kernel": "1",
        "load_before": 0.5,
    }
    return report.Run("2026-01-01T00:00:00+00:00", 7, False, machine, {"python": "3"}, figures, failures)


def test_a_mark_is_met_at_its_bound() -> None:
    assert Target(1.4).met(1.4)
    assert not Target(1.4).met(1.41)
    assert Target(0.33, at_least=True).met(0.33)
    assert not Target(0.33, at_least=True).met(0.32)


def test_a_miss_is_shown_as_a_miss() -> None:
    assert [figure.verdict for figure in (MET, MISSED, RAW)] == ["met", "MISSED", ""]
    assert run(MET, MISSED, RAW).missed == [MISSED]
    assert "MISSED" in report.table([MET, MISSED, RAW])


def test_results_have_marked_figures_by_their_keys_and_the_rest_as_raw(tmp_path: Path) -> None:
    report.write(run(MET, MISSED, RAW, failures=(Failure("fleet", "no"),)), tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["gateway_over_direct_p50"] == 2.5
    assert found["gateway_over_direct_throughput"] == 0.2
    assert found["raw"] == {"direct_p50_us": 412.3}
    assert found["details"]["gateway_over_direct_throughput"]["verdict"] == "MISSED"
    assert found["failures"] == {"fleet": "no"}


def test_every_mark_but_those_of_later_legs_is_a_figure_of_a_leg() -> None:
    keys = [key for leg in LEGS for key in leg.keys]
    assert len(keys) == len(set(keys))
    assert set(TARGETS) - set(keys) == set()


def test_legs_are_chosen_by_name_and_by_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEER", raising=False)
    assert chosen([]) == list(LEGS)
    monkeypatch.setenv("PEER", "1")
    assert chosen([]) == [*LEGS, PEER]
    assert [leg.name for leg in chosen(["start"])] == ["start"]
    assert [leg.name for leg in chosen(["peer"])] == ["peer"]
    assert [leg.name for leg in chosen(["gateway_over_direct_p50", "direct_over_echo_p50"])] == ["calls"]
    with pytest.raises(ValueError, match="no leg gives nonsense"):
        chosen(["nonsense"])


def test_promised_figures_stand_at_the_head_and_cold_starts_together(tmp_path: Path) -> None:
    cold = [Figure(f"{name}_cold_start_ms", 200.0, "ms") for name in ("gateway", "compute")]
    report.write(run(Figure("event_p50_ms", 3.0, "ms"), RAW, *cold), tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["event_p50_ms"] == 3.0
    assert found["cold_start_ms"] == {"gateway": 200.0, "compute": 200.0}
    assert set(found["raw"]) == {"direct_p50_us", "gateway_cold_start_ms", "compute_cold_start_ms"}


def test_a_failure_says_the_first_and_the_last_line_of_its_error() -> None:
    assert Failure.of("fleet", RuntimeError("down:\none\ntwo\nthree")).error == "RuntimeError: down: … three"
    assert Failure.of("fleet", RuntimeError("down")).error == "RuntimeError: down"


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (0.4567, "0.457")])
def test_numbers_have_the_digits_that_they_deserve(value: float, text: str) -> None:
    assert report.number(value) == text
