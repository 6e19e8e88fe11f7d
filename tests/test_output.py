"""Files of results are whole or absent."""

from pathlib import Path

import pytest

from parscale import InputError
from parscale.output import print_table
from parscale.utils.files import check_new, new_folder, write_text


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new" / "a.json", "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_whole_or_absent(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    before = out.stat().st_ino if there else None
    with pytest.raises(FileNotFoundError), new_folder(out) as folder:
        ((folder / "half").touch(), (folder / "none/half").touch())
    assert [p.name for p in tmp_path.rglob("*")] == ["out"] * there
    with new_folder(out) as folder:
        (folder / "a").write_text("all")
        assert not (out / "a").exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    assert before in (None, out.stat().st_ino)  # a shell may stand in it
    with pytest.raises(InputError, match="holds something already"):
        check_new(out)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out' cannot be written"), new_folder(tmp_path / "file/out"):
        raise AssertionError
    with pytest.raises(InputError, match="holds something already"):
        check_new(tmp_path / "file")


def test_brackets_in_a_table_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """And not rich's markup, which would swallow the first and fail at the second."""
    print_table("the [draft]", [{"text [a]": "notes [draft].txt", "loss": 1.0}, {"text [a]": "re[/a-z]", "loss": 2.0}])
    told = capsys.readouterr().out
    assert all(name in told for name in ("the [draft]", "text [a]", "notes [draft].txt", "re[/a-z]"))
