"""Charts as inline SVG: no script, no library, a few kilobytes each.

Shapes stretch with the page (``preserveAspectRatio="none"``). Labels are HTML beside them, so that they stay readable
on a phone, in print and for a screen reader. Every chart has a title and a description for those who cannot see it.

Dimension letters: B bins, P points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from dask_logits.records import Array

# Labels along a side: (share of its length, text).
Ticks = Sequence[tuple[float, str]]
# Width and height of the drawing, in units that the page stretches.
WIDTH, HEIGHT = 1000, 200
_LEVELS = 5
# Least columns of a map, so that few squares stay small, and how many times wider than high a large one is.
_LEAST_COLUMNS = 40
_ASPECT = 5


def svg(title: str, description: str, shapes: str, *, width: int = WIDTH, height: int = HEIGHT, css: str = "") -> str:
    """Return a drawing with its title and description."""
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" class="{css}" '
        f'aria-label="{escape(title)}: {escape(description)}"><title>{escape(title)}</title>{shapes}</svg>'
    )


def figure(title: str, description: str, shapes: str, x: Ticks, y: Ticks, *, unit: str, y_unit: str) -> str:
    """Return a drawing with labels on both axes, and their units."""
    lines = "".join(
        f'<line x1="0" x2="{WIDTH}" y1="{_n(HEIGHT * (1 - at))}" y2="{_n(HEIGHT * (1 - at))}" class="grid"/>'
        for at, _ in y
    )
    below = "".join(f'<span style="left:{100 * at:.2f}%">{escape(text)}</span>' for at, text in x)
    beside = "".join(f'<span style="bottom:{100 * at:.2f}%">{escape(text)}</span>' for at, text in y)
    return (
        f'<div class="chart"><div class="top">{escape(y_unit)}</div>'
        f'<div class="y" aria-hidden="true">{beside}</div>'
        f'<div class="plot">{svg(title, description, lines + shapes)}</div>'
        f'<div class="x" aria-hidden="true">{below}</div><div class="unit">{escape(unit)}</div></div>'
    )


def histogram(title: str, counts: Array, low: float, high: float, *, unit: str, y_unit: str, description: str) -> str:
    """Return the columns of a histogram whose bins are equally wide, from `low` to `high`."""
    top = nice_top(float(counts.max(initial=0)))
    width = WIDTH / max(1, len(counts))
    bars = "".join(
        f"M{_n(i * width + 0.75)} {HEIGHT}v-{_n(HEIGHT * value / top)}h{_n(width - 1.5)}V{HEIGHT}z"
        for i, value in enumerate(counts.tolist())
        if value
    )
    shapes = f'<path d="{bars}" class="fill"/>'
    return figure(title, description, shapes, axis(low, high), axis(0, top, 4), unit=unit, y_unit=y_unit)


def area(title: str, values: Array, x: Ticks, *, unit: str, y_unit: str, description: str, marks: str = "") -> str:
    """Return a stepped area of values in equal bins."""
    top = nice_top(float(values.max(initial=0)))
    shapes = f'<path d="{_steps(values, top, HEIGHT)}" class="area"/>{marks}'
    return figure(title, description, shapes, x, axis(0, top, 4), unit=unit, y_unit=y_unit)


def sparkline(title: str, values: Array, top: float, *, description: str) -> str:
    """Return a small stepped area, with the same scale for several of them."""
    return svg(title, description, f'<path d="{_steps(values, top, 40)}" class="area"/>', height=40, css="spark")


def line(title: str, points: Mapping[str, float], *, unit: str, y_unit: str, description: str) -> str:
    """Return a line through values from 0 to 1, equally far apart, each with its label."""
    step = WIDTH / max(1, len(points))
    places = [(step * (i + 0.5), HEIGHT * (1 - value)) for i, value in enumerate(points.values())]
    way = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
    dots = "".join(f"M{_n(x)} {_n(y)}h0" for x, y in places)
    shapes = f'<path d="{way}" class="line"/><path d="{dots}" class="dot"/>'
    x = [(x / WIDTH, label) for (x, _), label in zip(places, points, strict=True)]
    return figure(title, description, shapes, x, axis(0, 1, 4), unit=unit, y_unit=y_unit)


def shares(title: str, parts: Sequence[tuple[str, float]], *, description: str) -> str:
    """Return one bar cut into parts, in the colours of a legend: ``part0``, ``part1`` and so on."""
    total, at, shapes = sum(value for _, value in parts) or 1.0, 0.0, ""
    for i, (name, value) in enumerate(parts):
        width = WIDTH * value / total
        shapes += (
            f'<rect x="{_n(at)}" y="0" width="{_n(max(0.0, width - 1))}" height="40" class="part{i}">'
            f"<title>{escape(name)}: {100 * value / total:.1f} %</title></rect>"
        )
        at += width
    return svg(title, description, shapes, height=40, css="bar")


def spans(title: str, spans: Sequence[tuple[float, float, str]], *, description: str, marks: str = "") -> str:
    """Return boxes (begin, end as shares of the width, text on hover) in one lane."""
    boxes = "".join(
        f'<rect x="{_n(WIDTH * begin)}" y="0" width="{_n(max(1.0, WIDTH * (end - begin)))}" height="20" '
        f'class="box"><title>{escape(text)}</title></rect>'
        for begin, end, text in spans
    )
    return svg(title, description, boxes + marks, height=20, css="lane")


def shades(title: str, shares_B: Array, *, description: str, marks: str = "") -> str:
    """Return one lane of bins, the darker the larger their shares from 0 to 1."""
    levels = np.ceil(np.clip(shares_B, 0, 1) * _LEVELS).astype(int)
    edges = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
    unit, paths = WIDTH / max(1, len(levels)), [""] * (_LEVELS + 1)
    for first, last in pairwise(edges):
        paths[levels[first]] += f"M{_n(first * unit)} 0h{_n((last - first) * unit)}v20h-{_n((last - first) * unit)}z"
    shapes = "".join(
        f'<path d="{path}" class="fill" opacity="{level / _LEVELS:.1f}"/>'
        for level, path in enumerate(paths)
        if level and path
    )
    return svg(title, description, shapes + marks, height=20, css="lane")


def cells(title: str, kinds_C: Array, n_kinds: int, *, description: str) -> str:
    """Return a map of small squares, row by row, in the colours of a legend: ``kind0``, ``kind1`` and so on.

    Neighbours of one kind are one dashed line, so that thousands of squares take a few kilobytes.
    """
    columns = max(_LEAST_COLUMNS, math.ceil(math.sqrt(_ASPECT * len(kinds_C))))
    paths = [""] * n_kinds
    for y, first in enumerate(range(0, len(kinds_C), columns)):
        row = kinds_C[first : first + columns]
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for begin, end in pairwise(edges):
            paths[row[begin]] += f"M{10 * begin + 1} {10 * y + 5}h{10 * (end - begin) - 2}"
    shapes = "".join(f'<path d="{path}" class="kind{i}"/>' for i, path in enumerate(paths) if path)
    height = 10 * math.ceil(len(kinds_C) / columns)
    return svg(title, description, shapes, width=10 * columns, height=height, css="cells")


def crosses(title: str, places: Sequence[tuple[float, str]], *, description: str, css: str = "cross") -> str:
    """Return crosses at shares of the width of one lane, with their text on hover."""
    shapes = "".join(
        f'<g class="{css}"><title>{escape(text)}</title><path d="M{_n(WIDTH * at - 5)} 3l10 14m-10 0l10 -14"/></g>'
        for at, text in places
    )
    return svg(title, description, shapes, height=20, css="lane")


def pauses(places: Sequence[tuple[float, str]], height: int = HEIGHT) -> str:
    """Return dashed lines at shares of the width, with their text on hover."""
    return "".join(
        f'<line x1="{_n(WIDTH * at)}" x2="{_n(WIDTH * at)}" y1="0" y2="{height}" class="pause">'
        f"<title>{escape(text)}</title></line>"
        for at, text in places
    )


def axis(low: float, high: float, most: int = 5) -> Ticks:
    """Return the labels of an axis with at most `most` round steps.

    >>> axis(0, 1000, 4)
    [(0.0, '0'), (0.5, '500'), (1.0, '1,000')]
    """
    span = high - low
    if not span > 0:
        return [(0.0, number(low))]
    step = _nice(span / most)
    steps = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [((i * step - low) / span, number(i * step)) for i in steps]


def _nice(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def nice_top(value: float) -> float:
    """Return the end of an axis for values from 0.

    >>> nice_top(0.0), nice_top(83.0), nice_top(1200.0)
    (1.0, 90.0, 1200.0)
    """
    if not 0 < value < math.inf:
        return 1.0
    step = _nice(value / 10)
    return math.ceil(value / step - 1e-9) * step if step > 0 else 1.0


def number(value: float) -> str:
    """Format a number for a label.

    >>> number(0.25), number(12), number(1234.5), number(2_500_000)
    ('0.25', '12', '1,234', '2.5 M')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:,.3g} {letter}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _steps(values: Array, top: float, height: int) -> str:
    width = WIDTH / max(1, len(values))
    tops = (height - height * np.clip(values / top, 0, 1)).tolist()
    return f"M0 {height}" + "".join(f"V{_n(y)}H{_n((i + 1) * width)}" for i, y in enumerate(tops)) + f"V{height}z"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
