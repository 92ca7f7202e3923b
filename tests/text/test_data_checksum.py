"""The checksum of data depends on contents alone."""

from pathlib import Path

import pytest

from diffusify.text import data_checksum as module
from diffusify.text.data_checksum import data_checksum


@pytest.mark.parametrize("whole", [True, False])
def test_contents_decide(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_WHOLE", 1 << 30 if whole else 0)
    files = [tmp_path / name for name in ("a", "b", "c", "d", "e")]
    for file, text in zip(files, ("one", "two", "one", "", "x" * 10_000_000), strict=True):
        file.write_text(text)
    a, b, c, empty, long = files
    before = data_checksum(files)
    assert data_checksum([a, b]) == data_checksum([c, b]) != data_checksum([b, a])
    assert len({data_checksum(some) for some in ([a], [a, a], [a, empty], [empty], [])}) == 5
    long.touch()
    assert data_checksum(files) == before
    for position in (0, 10_000_000 - 1):  # whichever bytes are read, the ends are
        with long.open("r+") as file:
            file.seek(position)
            file.write("y")
        assert data_checksum(files) != before
        before = data_checksum(files)
    b.write_text("owt")
    assert data_checksum(files) != before
