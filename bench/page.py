"""`docs/performance.md` with its plots: the prose of `bench/page.md` and the figures of one run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench import anatomy
from bench.plots import Bar, bars
from tools.paths import ROOT

TEMPLATE = ROOT / "bench/page.md"
DOCUMENT = ROOT / "docs/performance.md"
PLOTS = "performance"
"""The folder of the plots beside the document."""

_PLACE = re.compile(r"^\{\{(\w+)\}\}$", re.MULTILINE)
_BESIDE = (
    ("start of a guest, paused", "qemu_start_p50_ms", "peer_start_ms"),
    ("destroy of a guest", "destroy_p50_ms", "peer_destroy_ms"),
    ("1,000 domains defined", "define_1000_ms", "peer_define_1000_ms"),
    ("1,000 domains started", "start_1000_ms", "peer_start_1000_ms"),
    ("1,000 domains listed", "list_1000_ms", "peer_list_1000_ms"),
    ("50 nodes of 100 domains read", "fleet_50x100_ms", "peer_fleet_50x100_ms"),
)
"""What is drawn side by side: ours, and the peer's figure of the same run."""


def write(results: dict[str, Any], table: str, document: Path = DOCUMENT, template: Path = TEMPLATE) -> None:
    """Write the page and its plots.

    Args:
        results: What `results.json` has.
        table: The figures as a table, with the machine.
        document: The page.
        template: Its prose, with places for what is measured.

    Raises:
        KeyError: The template has a place that nothing fills.
    """
    details: dict[str, dict[str, Any]] = results["details"]
    charts = _charts(details)
    folder = document.parent / PLOTS
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_text(chart)
    parts = {"figures": table.rstrip(), "missed": _missed(details), "start": _start(details)}
    parts |= {f"plot_{name}": f"![{name}]({PLOTS}/{name}.svg)" for name in charts}
    parts.setdefault("plot_peer", "No peer was measured in this run (`PEER=1 make bench`).")
    document.write_text(_PLACE.sub(lambda place: parts[place[1]], template.read_text()))


def _missed(details: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"- `{key}`: {detail['value']:.3g}, not {detail['target']}."
        for key, detail in details.items()
        if detail["verdict"] == "MISSED"
    ]
    return "\n".join(lines) or "Every figure that has a mark meets it."


def _steps(details: dict[str, dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Return the steps of a start: what ends each, when it began and how long it took."""
    at = 0.0
    steps = []
    found = {key: detail["value"] for key, detail in details.items() if key.startswith(anatomy.PREFIX)}
    for key, value in sorted(found.items(), key=lambda item: item[1]):
        words = key.removeprefix(anatomy.PREFIX).removesuffix("_ms").split("_", 1)
        steps.append((f"{words[0]} logs {words[1].upper()}" if len(words) > 1 else "the answer", at, value - at))
        at = value
    return steps


def _start(details: dict[str, dict[str, Any]]) -> str:
    rows = [f"| {at:.2f} | {took:.2f} | {what} |" for what, at, took in _steps(details)]
    return "\n".join(["| from, ms | for, ms | until |", "|---:|---:|---|", *rows])


def _charts(details: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the charts whose figures are there, by name."""

    def bar(label: str, key: str) -> list[Bar]:
        found = details.get(key)
        return [Bar(label, (found["value"],), f"{found['value']:.4g} {found['unit']}")] if found else []

    def chart(title: str, *lines: list[Bar]) -> str:
        flat = [line for part in lines for line in part]
        return bars(title, flat) if flat else ""

    steps = _steps(details)
    beside = [pair for label, ours, peer in _BESIDE for pair in (bar(label, ours), bar("libvirt", peer))]
    charts = {
        "calls": chart(
            "One GetDomain, median",
            bar("bare echo", "echo_p50_us"),
            bar("direct", "direct_p50_us"),
            bar("through the gateway", "gateway_p50_us"),
        ),
        "start": chart(
            "One StartDomain, median; each colour ends with an event of the table",
            [Bar("ours", tuple(took for _, _, took in steps), f"{sum(step[2] for step in steps):.1f} ms")]
            if steps
            else [],
            bar("bare spawn and handshake", "qemu_bare_p50_ms"),
        ),
        "transfers": chart(
            "Transfers through two hops of TLS",
            *(
                bar(label, key)
                for label, key in (
                    ("upload", "upload_mb_per_second"),
                    ("copy, same way", "tls_copy_upload_mb_per_second"),
                    ("download", "download_mb_per_second"),
                    ("copy, same way", "tls_copy_download_mb_per_second"),
                )
            ),
        ),
        "memory": chart(
            "High-water marks of memory in a transfer",
            *(
                bar(f"{process}, {way}", f"{way}_{process}_high_water_mib")
                for way in ("upload", "download")
                for process in ("gateway", "storage")
            ),
        ),
        "peer": chart("Beside libvirt, same run", *beside) if any(key.startswith("peer_") for key in details) else "",
    }
    return {name: drawn for name, drawn in charts.items() if drawn}
