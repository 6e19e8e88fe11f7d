"""Where `parscale export` writes, and what it leaves alone; no engine is needed."""

from pathlib import Path
from typing import Any

import pytest

from parscale.cli import main
from parscale.errors import InputError
from parscale.export import run
from parscale.export.run import export_model
from parscale.train.data import train_tokenizer
from tests.small import build, with_streams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    with_streams(build()).save_pretrained(folder)
    train_tokenizer(["some text"], 300).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: Any, tokenizer: Any, folder: Path, *_: Any) -> None:
        (folder / "model.onnx").write_text("a graph")

    monkeypatch.setattr(run, "_write", write)


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_other_folders_beside_it_are_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    assert export_model(model, tmp_path / "out", engine="onnx").folder == tmp_path / "out"
    assert names(tmp_path) == ["out", "out.partial", "out.partial/mine", "out/model.onnx"]


def test_the_folder_may_be_read_like_any_other(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    export_model(model, tmp_path / "new" / "out", engine="onnx")
    assert (tmp_path / "new" / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_empty_folder_where_one_stands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(model), "--to", "onnx", "--out", "."]) == 0
    assert names(tmp_path) == ["model.onnx"]
    assert names(Path()) == ["model.onnx"]  # it is still the same folder


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_of_a_failure(
    there: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    out = tmp_path / "out"
    if there:
        out.mkdir()
    monkeypatch.setattr(run, "_write", full)
    with pytest.raises(OSError, match="no space"):
        export_model(model, out, engine="onnx")
    assert names(tmp_path) == ["out"] * there


@pytest.mark.parametrize(
    ("argument", "value", "least"), [("sequences", 0, 1), ("sequences", -1, 1), ("block_size", 1, 2)]
)
def test_too_little_text_to_measure_is_refused(
    argument: str, value: int, least: int, model: Path, tmp_path: Path
) -> None:
    options: Any = {argument: value}
    with pytest.raises(InputError, match=f"^{argument}={value} is not accepted; give a number >= {least}$"):
        export_model(model, tmp_path / "out", engine="onnx", data=("stdlib",), **options)


def test_a_place_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export_model(model, tmp_path / "file" / "out", engine="onnx")
