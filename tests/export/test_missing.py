"""Without the engine's packages, `parscale export` says which extra to install and leaves nothing behind."""

import sys
from pathlib import Path

import pytest

from parscale.cli import main
from tests.small import build, with_streams


@pytest.mark.parametrize(("engine", "package"), [("onnx", "onnx"), ("openvino", "openvino")])
def test_the_extra_is_named(
    engine: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from parscale.train.data import train_tokenizer

    with_streams(build()).save_pretrained(tmp_path / "model")
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(tmp_path / "model"), "--to", engine, "--out", str(tmp_path / "out")]) == 2
    assert f"pip install 'parscale[{engine}]'" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
