"""Lines over time as an SVG: no library, a few hundred numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, PANEL_HEIGHT, TOP, LEFT, RIGHT, GAP = 860, 240, 44, 64, 130, 56
_COLOURS = ("#1b6ca8", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#566573")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """Is one diagram.

    Attributes:
        title: What is drawn, with its unit.
        lines: The points of each line, by its name.
    """

    title: str
    lines: Mapping[str, Points]


def draw(heading: str, axis: str, panels: Sequence[Panel]) -> str:
    """Return diagrams below each other, over the same axis from 0."""
    height = TOP + len(panels) * (PANEL_HEIGHT + GAP)
    last = max((x for panel in panels for points in panel.lines.values() for x, _ in points), default=1.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 22, heading, size=14),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, TOP + 20 + number * (PANEL_HEIGHT + GAP), last, axis)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: float, last: float, axis: str) -> list[str]:
    bottom, right = top + PANEL_HEIGHT - 30, WIDTH - RIGHT
    highest = max((y for points in panel.lines.values() for _, y in points), default=1.0) or 1.0
    step = _step(highest / 5)
    ceiling = step * (int(highest / step) + 1)

    def across(x: float) -> float:
        return LEFT + (right - LEFT) * x / last

    def down(y: float) -> float:
        return bottom - (bottom - top) * y / ceiling

    parts = [_text(LEFT, top - 8, panel.title)]
    for index in range(int(ceiling / step) + 1):
        y = index * step
        parts.append(f'<path d="M{LEFT} {down(y):.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, down(y) + 4, f"{y:g}", anchor="end"))
    unit = _step(last / 10)
    parts += [
        _text(across(index * unit), bottom + 16, f"{index * unit:g}", anchor="middle")
        for index in range(int(last / unit) + 1)
    ]
    parts.append(_text(right + 8, bottom + 16, axis))
    labels: list[float] = []
    ordered = sorted(panel.lines.items(), key=lambda line: -line[1][-1][1] if line[1] else 0.0)
    for index, (name, points) in enumerate(ordered):
        if not points:
            continue
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        place = max(down(points[-1][1]) + 4, *(label + 14 for label in labels)) if labels else down(points[-1][1]) + 4
        labels.append(place)
        parts.append(_text(right + 8, place, name, colour=colour))
    return parts


def _step(wanted: float) -> float:
    """Return the round number that is the next one above."""
    power = 1.0
    while power * 10 <= wanted:
        power *= 10
    while power > wanted:
        power /= 10
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )
