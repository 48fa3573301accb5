"""Rules for every suite: a skipped test is a failure, and what ran is written down for `tools.promises`."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest

RESULTS = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure: what a test needs is installed by the set-up, or the run says that it is not."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"{item.nodeid} would be skipped, which counts as a failure here: {reason}"
    results = item.config.stash.setdefault(RESULTS, {})
    if results.get(item.nodeid) != "failed":
        results[item.nodeid] = report.outcome
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole module into a failure."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} would be skipped as a whole, which counts as a failure here"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcome of each test to the file that VIRTFLEET_TEST_RESULTS names."""
    target = os.environ.get("VIRTFLEET_TEST_RESULTS")
    if target:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(session.config.stash.get(RESULTS, {}), indent=1, sort_keys=True) + "\n")
