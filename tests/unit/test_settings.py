"""Settings from the environment: what cannot be meant is refused, with the variable's name."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest

from motet.errors import SetupError
from motet.protocol.settings import Settings

NUMBERS = [field.name for field in fields(Settings) if get_type_hints(Settings)[field.name] is float]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_is_refused_with_its_name(name: str, text: str) -> None:
    with pytest.raises(SetupError, match=f"^MOTET_{name.upper()}: got {text}; expected"):
        Settings.from_env({f"MOTET_{name.upper()}": text})


@pytest.mark.parametrize("text", ["0", "0.05", "0.95", "30"])
def test_a_lane_takes_a_tenth_to_nine_tenths_of_a_device(text: str) -> None:
    with pytest.raises(SetupError, match=r"^MOTET_LANE_SHARE: got .*; expected a share from 0.1 to 0.9"):
        Settings.from_env({"MOTET_LANE_SHARE": text})
    assert Settings.from_env({"MOTET_LANE_SHARE": "0.9"}).lane_share == 0.9
