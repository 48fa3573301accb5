"""The page of the benchmark: what is measured fills the places of its prose, and the committed one is such a page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench import page, plots, report
from bench.figures import NAMED, Figure
from bench.legs import LEGS

STEPS = {"compute_operation_started": 2.0, "network_port_plugged": 9.0, "answer": 40.0}
MACHINE = {"cpu_count": 2, "cpu_model": "test", "memory_mib": 1, "system": "here", "kernel": "1", "load_before": 0.5}


def run(*more: Figure) -> report.Run:
    figures = [
        *(Figure(key, 1000.0, "ms") for key in sorted(NAMED)),
        *(Figure(key, 3.0, "µs") for key in ("echo_p50_us", "direct_p50_us", "gateway_p50_us", "qemu_bare_p50_ms")),
        *(Figure(f"start_at_{step}_ms", value, "ms") for step, value in STEPS.items()),
        *(Figure(f"{kind}_mb_per_second", 300.0, "MB/s") for kind in ("upload", "download", "tls_copy_upload")),
        *(Figure(f"{way}_storage_high_water_mib", 100.0, "MiB") for way in ("upload", "download")),
        *more,
    ]
    return report.Run("2026-01-01T00:00:00+00:00", 7, False, MACHINE, {"python": "3"}, figures, ())


def test_a_run_fills_every_place_of_the_page(tmp_path: Path) -> None:
    report.write_document(run(), tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "{{" not in text
    assert "| 2.00 | 7.00 | network logs PORT_PLUGGED |" in text
    assert "| 9.00 | 31.00 | the answer |" in text
    assert "- `list_1000_over_codec`: 1e+03, not ≤ 3." in text
    assert "No peer was measured" in text
    linked = set(re.findall(r"\((performance/\w+\.svg)\)", text))
    assert linked == {f"performance/{path.name}" for path in (tmp_path / "performance").iterdir()}
    for path in linked:
        assert ET.parse(tmp_path / path).getroot().tag.endswith("svg")


def test_a_peer_that_was_measured_is_drawn_beside_us(tmp_path: Path) -> None:
    report.write_document(run(Figure("peer_list_1000_ms", 200.0, "ms")), tmp_path / "page.md")
    assert "(performance/peer.svg)" in (tmp_path / "page.md").read_text()
    assert "libvirt" in (tmp_path / "performance/peer.svg").read_text()


def test_a_place_that_nothing_fills_is_an_error(tmp_path: Path) -> None:
    template = tmp_path / "template.md"
    template.write_text("{{nonsense}}\n")
    with pytest.raises(KeyError, match="nonsense"):
        page.write(run().document(), "", tmp_path / "page.md", template)


def test_a_chart_of_nothing_is_an_error_and_labels_are_escaped() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.bars("empty", [])
    assert "a &lt; b" in plots.bars("one", [plots.Bar("a < b", (1.0, 2.0), "3")])


def test_the_committed_page_has_the_prose_of_the_template_and_every_promised_figure() -> None:
    text = page.DOCUMENT.read_text()
    pieces = re.split(r"^\{\{\w+\}\}$", page.TEMPLATE.read_text(), flags=re.MULTILINE)
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        assert found >= 0, f"make bench writes this page; it lacks:\n{piece}"
        at = found + len(piece)
    rows = set(re.findall(r"^\| (\w+) \| [\d.,]+", text, flags=re.MULTILINE))
    missing = NAMED | {key for leg in LEGS for key in leg.keys if key != "cold_start_ms"}
    assert missing <= rows, missing - rows
    assert {f"{name}_cold_start_ms" for name in ("gateway", "compute", "storage", "network")} <= rows
    for link in re.findall(r"\((performance/\w+\.svg)\)", text):
        assert (page.DOCUMENT.parent / link).is_file()
