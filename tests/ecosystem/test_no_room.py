"""No room on the disk, or a text without an end: one line that says so, nothing half-written, the checkpoint named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model

from parscale import InputError, save_streams
from parscale.cli import main
from parscale.export import run as export
from parscale.law.plot import save_figure
from parscale.load import load_tokenizer
from parscale.merge_folder import merge_folder
from parscale.train import corpus, trainer
from parscale.train.corpus import read_documents, read_rows
from parscale.train.data import load_text, train_tokenizer
from parscale.train.folder import save_run
from parscale.train.streaming import stream_text
from parscale.utils.files import write_text
from tests.ecosystem.disk import no_file_above
from tests.small import build, with_streams

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for the old name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with streams and its base, each with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("room")
    tokenizer = train_tokenizer(["some text"], 300)
    for name in ("base", "lora"):
        model = build(vocab_size=len(tokenizer))
        if name == "lora":
            with_streams(model, diversify=("prefix", "lora"))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"Document {number}: " + f"word{number * 7 % 97} " * 20)
    return folder


def save_a_run(folder: Path, out: Path, adapters: bool = False) -> None:
    model = with_streams(build(vocab_size=300))
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_run(model, load_tokenizer(folder / "base"), out, {"result": {}}, None, [out / "checkpoint-8"])


def export_a_model(folder: Path, out: Path) -> None:
    """Without an engine: what is written beside the graph is what may fail in its own way."""

    def write(model: Any, tokenizer: Any, scratch: Path, *_: Any) -> None:
        tokenizer.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        (scratch / "model.onnx").write_bytes(bytes(5000))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_write", write)
        export.export_model(folder / "lora", out, engine="onnx")


def plot(out: Path, suffix: str) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    save_figure(figure, out / f"plot{suffix}")


def cache(make: Callable[..., Any], folder: Path, out: Path) -> None:
    make(folder / "text", block_size=16, tokenizer=load_tokenizer(folder / "base"), cache_dir=out)


SAVES: dict[str, Callable[[Path, Path], Any]] = {
    "run": save_a_run,
    "adapters": lambda folder, out: save_a_run(folder, out, adapters=True),
    "merge-first": lambda folder, out: merge_folder(folder / "lora", out),
    "export": export_a_model,
    "streams": lambda folder, out: save_streams(with_streams(build()), out),
    "text": lambda folder, out: write_text(out / "rows.jsonl", "x" * 5000),
    "png": lambda folder, out: plot(out, ".png"),
    "svg": lambda folder, out: plot(out, ".svg"),
    "pdf": lambda folder, out: plot(out, ".pdf"),
    "cache": lambda folder, out: cache(load_text, folder, out),
    "streamed cache": lambda folder, out: cache(stream_text, folder, out),
}


def files(out: Path) -> dict[str, int]:
    return {str(file.relative_to(out)): file.stat().st_size for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("save", list(SAVES))
def test_no_room_for_any_one_file(save: str, folder: Path, tmp_path: Path) -> None:
    """Each file in turn is the first that does not fit."""
    SAVES[save](folder, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert whole
    matplotlib.rcdefaults()
    for number, size in enumerate(sorted({size for size in whole.values() if size > 1 << 6})):
        out = tmp_path / str(number)
        with pytest.raises((InputError, OSError), match="File too large") as refused, no_file_above(size - 1):
            SAVES[save](folder, out)
        assert "\n" not in str(refused.value)
        assert not out.exists() or files(out) == {}, "nothing is half-written"
    SAVES[save](folder, tmp_path / "0")
    assert files(tmp_path / "0").keys() == whole.keys()


@pytest.mark.parametrize("save", ["run", "streams", "text", "png"])
def test_what_was_there_stays(save: str, folder: Path, tmp_path: Path) -> None:
    SAVES[save](folder, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises((InputError, OSError), match="File too large"), no_file_above(max(files(tmp_path).values()) - 1):
        SAVES[save](folder, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("save_every", [None, 2])
@pytest.mark.parametrize("room", [100, 20_000])
def test_a_run_without_room_at_its_end(peft, save_every, room, folder, tmp_path, monkeypatch, capsys) -> None:
    """One line and status 2, with the checkpoint before; what is left can be gone on with."""

    def without_room(*args: Any) -> None:
        with no_file_above(room):
            save_run(*args)

    out = tmp_path / "out"
    asked = ["train", "retrofit", "--model", str(folder / "base"), "--data", str(folder / "text"), "--output", str(out),
             "--tokens", "192", "--batch-size", "4", "--block-size", "16", "--evaluations", "1", "--streams", "2",
             "--validation-blocks", "2", "--peft", peft]  # fmt: skip
    asked += ["--save-every", str(save_every)] if save_every else []
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_run", without_room)
        assert main(asked) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "learning_rate" not in line]
    assert len(told) == 1
    assert "cannot write there" in told[0]
    assert "File too large" in told[0]
    if save_every is None:
        assert "there is no checkpoint" in told[0]
        assert not out.exists()
        return
    assert "checkpoint-2 is whole" in told[0]
    assert [file.name for file in out.iterdir()] == ["checkpoint-2"]
    assert main([*asked, "--resume"]) == 0
    assert (out / "train.json").exists()


def test_no_room_to_move_a_model_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is whole then, and whoever comes next moves it."""
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(InputError, match=r"No space left.*the model is whole, and moved there by --resume"):
            save_a_run(folder, tmp_path)
    trainer.finished_run(tmp_path)
    save_a_run(folder, tmp_path / "other")
    assert files(tmp_path / "other").items() <= files(tmp_path).items()


ENDLESS = ("zero.txt", "zero.py", "zero.jsonl", "zero.txt.zst", "zero.jsonl.zst", "zero.parquet")


@pytest.mark.parametrize("kind", ["device", "pipe"])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_text_without_an_end_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(file)
    readers = [read_documents, lambda source: stream_text(source, cache_dir=tmp_path / "cache")]
    for read in [*readers, lambda source: list(read_rows(source))] if "jsonl" in name else readers:
        with pytest.raises(InputError, match=f"{name}: (not a regular file|give an existing file)"):
            read(file)


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_verb_refuses_a_text_without_an_end(verb: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    asked = {"train": ["train", "retrofit", "--output", str(tmp_path / "out"), "--model"], "eval": ["eval"]}
    assert main([*asked[verb], str(folder / "base"), "--data", str(tmp_path / "zero.txt")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "zero.txt: not a regular file" in told
    assert not (tmp_path / "out").exists()


def test_a_text_that_does_not_fit_in_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        raise MemoryError

    monkeypatch.setattr(corpus, "_chunks", full)
    (tmp_path / "large.txt").write_text("text")
    with pytest.raises(InputError, match=r"large\.txt: does not fit in memory"):
        read_documents(tmp_path)
