"""A rule over a card's last days: how unusual a payment is. It reads what the open job folded, and no history itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Payments of a card in its last 30 days from which on its own mean says something.
_KNOWN = 5


def judge(
    rows: Sequence[Mapping[str, Any]],
    *,
    large: float = 220.0,
    times: float = 4.0,
    most: int = 8,
    spent: float = 800.0,
) -> list[dict[str, Any]]:
    """``{"score", "reason"}`` of each payment, from 0 to 1; above 0.5 is an alert. Runs at the workers.

    A row has ``amount`` and, of the same card before it, ``usual`` (mean of 30 days, or None), ``n_month`` and ``n_day``
    (payments in 30 days and in one) and ``spent_day``. Unusual is more than ``large``, more than ``times`` the usual, more
    than ``most`` payments in a day, or more than ``spent`` in one.
    """
    return [_judged(row, large, times, most, spent) for row in rows]


def _judged(row: Mapping[str, Any], large: float, times: float, most: int, spent: float) -> dict[str, Any]:
    amount, usual = row["amount"], row["usual"] or 0.0
    count, total = row["n_day"] + 1, row["spent_day"] + amount
    ratios = {
        f"{amount:.2f} at once": amount / large,
        f"payment {count} in a day": count / most,
        f"{total:.2f} in a day": total / spent,
    }
    if row["n_month"] >= _KNOWN and usual > 0:
        ratios[f"{amount / usual:.1f} times the usual {usual:.2f}"] = amount / usual / times
    reason, ratio = max(ratios.items(), key=lambda one: one[1])
    # A half where it is exactly as large as may be.
    score = ratio / (1 + ratio)
    return {"score": round(score, 4), "reason": reason if score > 0.5 else ""}
