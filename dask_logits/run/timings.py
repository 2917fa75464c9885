"""Format counts, durations and time shares of a run as text."""

from __future__ import annotations

from collections.abc import Mapping

# Stages inside `score`.
_SCORING = ("trunk", "head", "tail", "refine", "transfer")


def plural(count: int, noun: str) -> str:
    """Format a count with its noun.

    >>> plural(1, "driver"), plural(1200, "row")
    ('1 driver', '1,200 rows')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def each_of(workers: int) -> str:
    """Format the number of workers that a figure applies to.

    >>> each_of(1), each_of(4)
    ('1 worker', 'each of 4 workers')
    """
    return "1 worker" if workers == 1 else f"each of {workers:,} workers"


def duration(seconds: float) -> str:
    """Format a duration for display.

    >>> duration(7.4), duration(95), duration(7260)
    ('7 s', '1 min 35 s', '2 h 01 min')
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"


def add_seconds(so_far: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Add the seconds of a partition's stages to a running total."""
    return {stage: so_far.get(stage, 0.0) + more.get(stage, 0.0) for stage in {**so_far, **more}}


def breakdown(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return stage → seconds of a worker's time, without waiting for the teacher. The ``rest`` is that of `score`."""
    inner = {stage: seconds.get(stage, 0.0) for stage in _SCORING}
    outer = {stage: value for stage, value in seconds.items() if stage not in (*_SCORING, "score", "wait")}
    return {**outer, **inner, "rest": seconds.get("score", 0.0) - sum(inner.values())}


def shares(seconds: Mapping[str, float]) -> str:
    """Format the shares of a worker's time, largest first. Waiting for the teacher is excluded.

    >>> shares({"score": 9.0, "trunk": 7.0, "head": 1.5, "tail": 0.4, "write": 1.0, "wait": 3.0})
    'trunk 70 %, head 15 %, write 10 %, tail 4 %, rest 1 %'
    """
    parts = breakdown(seconds)
    total = sum(parts.values())
    rest = parts.pop("rest")
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    shown = [(stage, value) for stage, value in ranked if value >= 0.005 * total] + [("rest", rest)]
    return ", ".join(f"{stage} {100 * value / max(total, 1e-9):.0f} %" for stage, value in shown)
