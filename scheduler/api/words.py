"""Numbers, times and amounts in words, for pages. Pure."""

from __future__ import annotations

from math import floor, log10


def number(value: float) -> str:
    """``12,345``, or ``1.23`` below ten."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10 else f"{value:.2f}"


def compact(value: float) -> str:
    """``950``, ``12.3 k``, ``4.56 M``: three digits that count."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            shown = value / (1e3 if unit == "k" else size)
            return f"{shown:,.{max(0, 2 - floor(log10(abs(shown))))}f} {unit}"
    return number(value)


def duration(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if whole < 120:
        return f"{whole} s"
    if hours < 1:
        return f"{m} min {s:02} s"
    return f"{h} h {m:02} min" if days < 1 else f"{days} d {h} h"


def percent(share: float) -> str:
    """``38 %``; all but everything is not ``100 %``."""
    return f"{min(99, round(share * 100)) if share < 1 else 100} %"


def moment(iso: str | None) -> str:
    """``2026-11-23 18:33:00 UTC`` of an RFC 3339 time."""
    return f"{iso[:10]} {iso[11:19]} UTC" if iso else "–"
