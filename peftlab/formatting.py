"""Formats numbers and texts for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from peftlab.specs.metrics import family_of


def number(value: Any) -> float:
    """``value`` as a float; run.json stores non-finite ones as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def metric(name: str, value: Any) -> str:
    """Four decimals for shares, four significant digits for values without a bound; ``-`` for None."""
    if value is None:
        return "-"
    value = number(value)
    if not math.isfinite(value):
        return str(value)
    if not _is_unbounded(name):
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}".removesuffix(".")


def _is_unbounded(name: str) -> bool:
    spec = family_of(name)
    return spec is not None and math.isinf(spec.highest)


def change(name: str, before: Any, after: Any) -> tuple[str, int]:
    """The signed difference, and whether it is better (1), worse (-1) or neither (0)."""
    if before is None or after is None:
        return "", 0
    difference = number(after) - number(before)
    if not math.isfinite(difference):
        return "", 0
    text = metric(name, abs(difference))
    if not text.strip("0.,"):
        return "=", 0
    spec = family_of(name)
    sign = "+" if difference > 0 else "-"
    if spec is None or spec.better is None:
        return f"{sign}{text}", 0
    return f"{sign}{text}", 1 if (difference > 0) == spec.higher_is_better else -1


def small(value: Any) -> str:
    """Two significant digits for errors and divergences: 0.013, 2.1e-15."""
    value = number(value)
    return f"{value:.2g}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``1 min 05 s``, ``2 h 03 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(num_bytes: float) -> str:
    """Decimal units, as the progress line shows them: 2.1 GB is 2.1e9 bytes."""
    if num_bytes < 99.5e3:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 999.5e6 else f"{num_bytes / 1e6:.1f} MB"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def one_line(text: str, width: int | None = None) -> str:
    """``text`` in one line, clipped to ``width`` characters."""
    flat = " ".join(printable(text).split())
    return flat if width is None or len(flat) <= width else f"{flat[: max(0, width - 3)]}..."


def joined(parts: Iterable[str], *, width: int, gap: str = ",  ") -> Sequence[str]:
    """The parts, joined into as few lines of ``width`` characters as possible."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(gap) + len(part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


def share(part: float, whole: float) -> str:
    """``37 %``, below ten ``4.6 %``; 0 % and 100 % mean exactly none and all."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 9.95 or 99 < percent < 100:
        return f"{min(max(percent, 0.1), 99.9):.1f} %"
    return f"{percent:.0f} %"


def printable(text: str) -> str:
    """``text`` without control characters: data must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
