"""Files of results are whole or absent."""

from pathlib import Path

import pytest

from parscale.output import write_text


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new" / "a.json", "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
