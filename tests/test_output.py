"""Files of results are whole or absent."""

from pathlib import Path

import pytest

from parscale.output import print_table, write_text


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new" / "a.json", "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_brackets_in_a_table_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """And not rich's markup, which would swallow the first and fail at the second."""
    print_table("the [draft]", [{"text [a]": "notes [draft].txt", "loss": 1.0}, {"text [a]": "re[/a-z]", "loss": 2.0}])
    told = capsys.readouterr().out
    assert all(name in told for name in ("the [draft]", "text [a]", "notes [draft].txt", "re[/a-z]"))
