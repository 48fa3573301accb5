"""A run as a table, as `results.json`, and as `docs/performance.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import page
from bench.figures import NAMED, Failure, Figure
from tools.paths import ROOT

RESULTS = ROOT / "bench/results.json"


@dataclass(frozen=True, slots=True)
class Run:
    """Is what came out of a run.

    Attributes:
        date: When, as RFC 3339.
        seed: Of the orders.
        quick: Whether it was a quick one, whose figures say little.
        machine: Facts of the machine.
        versions: Of what was measured.
        figures: The results.
        failures: The legs that could not be measured.
    """

    date: str
    seed: int
    quick: bool
    machine: dict[str, Any]
    versions: dict[str, str]
    figures: Sequence[Figure]
    failures: Sequence[Failure]

    @property
    def missed(self) -> list[Figure]:
        """The figures that miss their marks."""
        return [figure for figure in self.figures if figure.verdict == "MISSED"]

    def document(self) -> dict[str, Any]:
        """Return it as `results.json` has it: what is promised by its key, all else under `raw`."""
        values = {figure.key: round(figure.value, 4) for figure in self.figures}
        cold = {
            key.removesuffix("_cold_start_ms"): value for key, value in values.items() if key.endswith("_cold_start_ms")
        }
        return {
            **{key: value for key, value in values.items() if key in NAMED},
            **({"cold_start_ms": cold} if cold else {}),
            "raw": {key: value for key, value in values.items() if key not in NAMED},
            "details": {
                figure.key: {**asdict(figure), "target": str(figure.target or ""), "verdict": figure.verdict}
                for figure in self.figures
            },
            "failures": {failure.leg: failure.error for failure in self.failures},
            "date": self.date,
            "seed": self.seed,
            "quick": self.quick,
            "machine": self.machine,
            "versions": self.versions,
        }


def write(run: Run, path: Path = RESULTS) -> None:
    """Write `results.json`."""
    path.write_text(json.dumps(run.document(), indent=2, ensure_ascii=False) + "\n")


def number(value: float) -> str:
    """Return a value with as many digits as it deserves."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """Return the cells of the table: those with marks first."""
    ordered = sorted(figures, key=lambda figure: figure.target is None)
    return [
        (
            figure.key,
            f"{number(figure.value)} {'' if figure.unit == 'ratio' else figure.unit}".strip(),
            str(figure.target or ""),
            figure.verdict,
            str(figure.count),
            figure.note,
        )
        for figure in ordered
    ]


_HEAD = ("figure", "value", "mark", "", "n", "")


def table(figures: Sequence[Figure]) -> str:
    """Return the table as plain text."""
    cells = [_HEAD, *rows(figures)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    right = {1, 4}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def write_document(run: Run, path: Path = page.DOCUMENT) -> None:
    """Write the page of a run, with its plots."""
    page.write(run.document(), markdown(run), path)


def markdown(run: Run) -> str:
    """Return the tables of a run for the document."""
    machine, versions = run.machine, run.versions
    lines = [
        f"Measured {run.date} on {machine['cpu_count']} cores ({machine['cpu_model']}), {machine['memory_mib']} MiB, "
        f"{machine['system']}, kernel {machine['kernel']}, load {machine['load_before']:.1f} before; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; seed {run.seed}{', a quick run' if run.quick else ''}.",
        "",
        "| figure | value | mark | | n | |",
        "|---|---:|---|---|---:|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in rows(run.figures)]
    if run.failures:
        lines += ["", *(f"- **Not measured: {failure.leg}.** {failure.error}" for failure in run.failures)]
    return "\n".join(lines) + "\n"
