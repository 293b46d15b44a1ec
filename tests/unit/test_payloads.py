"""What the dispatcher keeps of rows that it packed lately: no more than its cache may hold, whatever stands in it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scheduler import payloads
from scheduler.blocks import uint32_bytes
from scheduler.payloads import Payloads
from scheduler.store.manifests import Manifests


def test_places_with_an_order_and_no_texts_leave_the_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    order = uint32_bytes(range(1000))
    monkeypatch.setattr(payloads, "_CACHE_BYTES", 10 * len(order))
    monkeypatch.setattr(
        payloads.payload_rows, "upstream_answers", lambda _, places: {place: (order, []) for place in places}
    )
    packed = Payloads(cast(Any, SimpleNamespace(reading=nullcontext)), Manifests())
    for block in range(100):
        place = ("job", 0, block)
        assert list(packed._upstream_of({place})) == [place]
        assert len(packed._upstream) <= 10
