"""The command line as other tools have it: a closed pipe ends it quietly, and what cannot be parsed is one line."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from parscale import cli
from parscale.cli import CLOSED_PIPE, main
from parscale.train.data import train_tokenizer
from tests.small import build, with_streams

WORDS = "def area(radius):\n    return 3 * radius ** 2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with streams and its tokenizer (`m`), and a text (`text.txt`)."""
    folder = tmp_path_factory.mktemp("lines")
    tokenizer = train_tokenizer([WORDS], 300)
    with_streams(build(vocab_size=len(tokenizer))).save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    (folder / "text.txt").write_text(WORDS * 40)
    return folder


@contextmanager
def closed_pipe(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[io.TextIOWrapper]:
    """`sys.stdout` or `sys.stderr`, by name, as a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w", 1, "utf-8") as stream:  # noqa: PTH123 (a descriptor)
        patch.setattr(sys, name, stream)
        yield stream
        stream.flush()  # nothing is left for the interpreter to complain of when it ends


PRINTING = (
    ("--help",), ("--version",), ("train", "--help"), ("cost",), ("cost", "--json"), ("plan",), ("plan", "--json"),
    ("law", "claim"), ("law", "claim", "--json"), ("law", "predict", "--params", "1e9"), ("law", "--help"),
    ("experiment", "baseline", "--scale", "paper"),
)  # fmt: skip
OF_A_MODEL = (
    ("generate", "m", "def ", "--max-new-tokens", "2"),
    ("probe", "m", "--data", "text.txt", "--block-size", "16"),
    ("probe", "m", "--data", "text.txt", "--block-size", "16", "--json"),
    ("eval", "m", "--data", "text.txt", "--block-size", "16"),
    ("eval", "m", "--data", "text.txt", "--block-size", "16", "--json"),
)


@pytest.mark.parametrize("arguments", PRINTING + OF_A_MODEL, ids=" ".join)
def test_a_closed_pipe_ends_a_verb_quietly(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PARSCALE_CACHE", str(folder / "cache"))
    with closed_pipe(monkeypatch, "stdout"):
        assert main(list(arguments)) == CLOSED_PIPE
    assert capsys.readouterr().err == ""


def test_a_process_whose_reader_has_gone_ends_as_other_tools_do() -> None:
    shell = f"({sys.executable} -m parscale cost --json; echo $? >&2) | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stderr == "141\n"


def test_a_closed_error_stream_is_quiet_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_pipe(monkeypatch, "stderr"):
        assert main(["cost", "--batch", "x"]) == CLOSED_PIPE


def test_another_broken_pipe_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli.VERBS, "demo", broken)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "parscale: [Errno 32] Broken pipe\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "parscale", "cost", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "No space left" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("cost", "--batch", "x"), "--batch: Could not find valid parse for arguments: ['x']; give --batch [INT"),
        (("cost", "--batch", "1.5"), "['1.5']; give --batch [INT"),
        (("cost", "--batch", "9" * 500 + "x"), "9x']; give --batch"),
        (("cost", "--flops-efficiency", "x"), "could not convert string to float: 'x'; give --flops-efficiency FLOAT"),
        (("cost", "--dtype", "z"), "invalid choice 'z' for argument '--dtype'. Expected one of ('fp32', 'bf16'"),
        (("cost", "--flop-efficiency", "2"), "Perhaps you meant: --flops-efficiency FLOAT"),
        (("train", "pretrain", "--output", "o", "--tokens", "1.5"), "from ['1.5']; give --tokens {None}|INT"),
        (("train", "pretrain", "--output", "o", "--tokens", "inf"), "from ['inf']; give --tokens"),
        (("train", "pretrain", "--output", "o", "--tokens", "nan"), "from ['nan']; give --tokens"),
        (("train", "pretrain", "--output", "o", "--learning-rate", "abc"), "'abc'; give --learning-rate FLOAT"),
        (("train", "pretrain"), "Missing from parscale train: --output PATH"),
        (("train",), "Missing from parscale train: {pretrain,retrofit,frozen,sft} --output PATH"),
        (("pilot", "m", "--data", "d", "--minutes", "many"), "'many'; give --minutes FLOAT"),
        (("law", "fit", "--bootstrap", "x"), "'x'; give --bootstrap INT"),
        (("law", "fit"), "give either a CSV of runs or --paper"),
        (("law",), "Expected one of {fit, predict, equivalent, claim}"),
        (("nonsense",), "Unrecognized options: nonsense; Available subcommands: train, demo"),
        ((), "Expected one of {train, demo"),
    ],
    ids=str,
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_cannot_be_parsed_is_one_line(
    arguments: tuple[str, ...],
    told: str,
    encoding: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether or not tyro draws its boxes in Unicode."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), told in error) == (1, True), error
    assert len(error) < 400
    assert "╭" not in error


def test_the_verb_runs_after_the_arguments_are_read(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What it prints on the error stream is not taken for an error of parsing, and its exit is its own."""

    def says(number: int = 1) -> None:
        print(number, file=sys.stderr)
        raise SystemExit(3)

    monkeypatch.setitem(cli.VERBS, "demo", says)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--number", "7"])
    assert (end.value.code, capsys.readouterr().err) == (3, "7\n")
