"""Bars as SVG: no library, no script, readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _LABEL, _BAR, _GAP, _TOP = 720, 230, 18, 8, 34
_COLOURS = ("#3b76c4", "#c4813b", "#4c9a5b", "#8a5fb0", "#b0505f", "#5f8ea0", "#8a8a3b")


@dataclass(frozen=True, slots=True)
class Bar:
    """Is one line of a chart.

    Attributes:
        label: What it is.
        parts: Its values, drawn one after the other.
        text: What stands behind it.
    """

    label: str
    parts: tuple[float, ...]
    text: str


def bars(title: str, lines: Sequence[Bar]) -> str:
    """Return a chart of horizontal bars on one scale.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not lines:
        raise ValueError(f"{title}: there is nothing to draw")
    longest = max(sum(line.parts) for line in lines) or 1.0
    scale = (_WIDTH - _LABEL - 130) / longest
    height = _TOP + len(lines) * (_BAR + _GAP) + _GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"',
        ' font-family="sans-serif" font-size="12" fill="#777">',
        f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for index, line in enumerate(lines):
        y = _TOP + index * (_BAR + _GAP)
        x = float(_LABEL)
        out.append(f'<text x="{_LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(line.label)}</text>')
        for number, part in enumerate(line.parts):
            colour = _COLOURS[number % len(_COLOURS)]
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{part * scale:.1f}" height="{_BAR}" fill="{colour}"/>')
            x += part * scale
        out.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{escape(line.text)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
