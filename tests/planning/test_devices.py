"""Parsing of token amounts and device groups."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusify.planning import devices
from diffusify.planning.devices import DEVICES, DeviceGroup, matmul_rate, parse_amount


@given(number=st.floats(1e-3, 1e6), unit=st.sampled_from(["", "K", "M", "B", "T", "k", "m", "b", "t"]))
def test_amounts_are_parsed(number: float, unit: str) -> None:
    size = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit.upper()]
    assert parse_amount(f"{number!r}{unit}") == pytest.approx(number * size)


def test_amounts_in_every_notation() -> None:
    assert [parse_amount(text) for text in ("65B", "300M", "1e9", "2,000", "1_000", "1.5k")] == [
        65e9, 300e6, 1e9, 2000, 1000, 1500,
    ]  # fmt: skip
    for text in ("-1", "0", "65Q", "", "B", "1e999", "nan", "1.2.3", "1e9x"):
        with pytest.raises(ValueError, match="tokens="):
            parse_amount(text)


def test_device_groups_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "matmul_rate", partial(matmul_rate, size=128, repeats=2))
    assert DeviceGroup.parse("64xH100") == DeviceGroup(DEVICES["H100"], 64) and DeviceGroup.parse("rtx4090").count == 1
    assert str(DeviceGroup.parse("8 x A100-80GB")) == "8xA100-80GB"
    cpu = DeviceGroup.parse("cpu").device
    assert cpu.half > 0 and cpu.single > 0 and cpu.memory > 0.1
