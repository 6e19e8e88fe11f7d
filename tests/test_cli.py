"""The command line as a user meets it: exit codes, one line of error, nothing half-written."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from parscale import __version__
from parscale.cli import main
from parscale.generate import complete
from parscale.load import load_tokenizer
from tests.corpora import write_corpus
from tests.small import build, with_streams

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def parscale(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb in `folder`; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PARSCALE_CACHE", str(folder / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def trained(folder: Path, parscale: Run) -> Path:
    if not (folder / "base").exists():
        write_corpus(folder / "corpus")
        text = ("--data", "corpus", "--vocab-size", 384, "--block-size", 32, "--batch-size", 8, "--tokens", 5 * 256)
        code, _, error = parscale("train", "pretrain", "--output", "base", "--model", "nano", "--streams", 2, *text)
        assert code == 0, error
    return folder / "base"


def test_generate_runs_all_streams_on_hard_tokens_alone(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = with_streams(AutoModelForCausalLM.from_config(shape), kv="shared", diversify=("prefix", "lora"))
    made = {
        name: complete(model, tokenizer, "def ", max_new_tokens=12, **options)
        for name, options in {
            "all": {}, "one": {"streams": 1}, "hard": {"hard_entropy": 0.0}, "easy": {"hard_entropy": 99.0},
        }.items()
    }  # fmt: skip
    assert made["hard"] == made["all"] != made["one"] == made["easy"]


def test_generate_and_probe_work_on_a_trained_model(trained: Path, parscale: Run) -> None:
    code, out, error = parscale("generate", trained, "def ", "--max-new-tokens", 4, "--streams", 1)
    assert code == 0, error
    assert out.startswith("def ")
    for wrong in (("--streams", 3), ("--max-new-tokens", 0), ("--temperature", -1), ("--hard-entropy", 1)):
        code, out, error = parscale("generate", trained, "def ", *wrong)
        assert (code, out) == (2, ""), error
        assert error.strip().count("\n") == 0
    code, out, error = parscale("probe", trained, "--data", "corpus", "--block-size", 32, "--json")
    assert code == 0, error
    assert len(json.loads(out)["weights"]) == 2
    code, out, error = parscale("probe", trained, "--data", "corpus", "--block-size", 32)
    assert code == 0, error
    assert "loss alone" in out


def test_what_has_no_value_is_null_in_json(trained: Path, folder: Path, parscale: Run) -> None:
    """Errors that are all zero have no correlation; NaN is no JSON."""
    for name, model in (("even", with_streams(build(vocab_size=384))), ("control", build(vocab_size=384))):
        model.lm_head.weight.data.zero_()
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(trained).save_pretrained(folder / name)
    arguments = ("--control", "control", "--data", "corpus", "--block-size", 32)
    code, out, error = parscale("probe", "even", *arguments, "--json")
    assert code == 0, error
    assert "NaN" not in out
    assert json.loads(out)["error_correlation"] is None


def test_the_folder_that_one_stands_in_may_be_the_output(
    trained: Path, parscale: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = trained.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = ("--data", "../corpus", "--block-size", 32, "--batch-size", 8, "--tokens", 256, "--evaluations", 1)
    code, _, error = parscale("train", "retrofit", "--model", "../base", "--output", ".", *text)
    assert code == 0, error
    assert {"train.json", "config.json", "tokenizer.json"} <= {file.name for file in here.iterdir()}
    assert Path.cwd().exists()
    code, _, error = parscale("train", "retrofit", "--model", "../base", "--output", ".", *text)
    assert (code, "not an empty folder" in error) == (2, True)
    assert not list(trained.parent.glob(".*.partial"))


def test_sequences_beyond_learned_positions_are_refused_in_one_line(trained: Path, parscale: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(trained.parent / "gpt2")
    tokenizer.save_pretrained(trained.parent / "gpt2")
    asked = ("train", "retrofit", "--model", "gpt2", "--output", "g", "--data", "corpus", "--tokens", 512)
    pilot = ("pilot", "gpt2", "--out", "pilot", "--block-size", 64)
    for verb in ((*asked, "--block-size", 64, "--batch-size", 8), ("eval", "gpt2"), pilot):
        code, _, error = parscale(*verb, "--data", "corpus")
        assert (code, error.count("\n"), "'gpt2' has learned positions for 32 tokens" in error) == (2, 1, True), error
    code, out, error = parscale("generate", "gpt2", "def main(", "--max-new-tokens", 64)
    assert (code, out, error.count("\n"), "learned positions for 32 tokens" in error) == (2, "", 1, True), error
    code, _, error = parscale(*asked, "--block-size", 32, "--batch-size", 8, "--evaluations", 1)
    assert code == 0, error  # a prefix takes no position
    code, _, error = parscale("probe", "g", "--data", "corpus", "--block-size", 64)
    assert (code, error.count("\n"), "'g' has learned positions for 32 tokens" in error) == (2, 1, True), error


def test_a_control_of_another_vocabulary_is_refused(trained: Path, parscale: Run) -> None:
    build(vocab_size=384).save_pretrained(trained.parent / "other")
    backend = AutoTokenizer.from_pretrained(trained)
    backend.add_tokens(["<|one more|>"])
    backend.save_pretrained(trained.parent / "other")
    code, _, error = parscale("probe", trained, "--control", "other", "--data", "corpus", "--block-size", 32)
    assert (code, error.count("\n"), "'other' has another vocabulary" in error) == (2, 1, True), error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "base", "\udcff\udcfe"), "not UTF-8"),
        (("generate", "base", "def", "--temperature", "nan"), "temperature=nan"),
        (("generate", "base", "def", "--seed", 10**22), "seed=10000000000000000000000"),
        (("probe", "base", "--data", "corpus", "--sequences", 0), "sequences=0"),
        (("pilot", "base", "--data", "corpus", "--batch-size", 0), "batch_size=0"),
        (("train", "pretrain", "--output", "inf", "--data", "corpus", "--learning-rate", "inf"), "learning_rate=inf"),
        (("train", "pretrain", "--output", "c", "--data", "corpus", "--gradient-clip", -1), "gradient_clip=-1"),
        (("experiment", "baseline", "--workers", 0), "workers=0"),
        (("experiment", "baseline", "--minutes", -1), "minutes=-1"),
        (("report", "no-rows"), "no row of an experiment"),
    ],
)
def test_numbers_and_texts_that_cannot_serve(
    arguments: tuple[object, ...], told: str, trained: Path, parscale: Run
) -> None:
    (trained.parent / "no-rows").mkdir(exist_ok=True)
    (trained.parent / "no-rows" / "baseline.jsonl").write_text('{"a": 1}\n')
    code, _, error = parscale(*arguments)
    assert (code, error.count("\n"), told in error) == (2, 1, True), error


def test_streams_that_the_model_has_are_gone_on_with_and_others_refused(trained: Path, parscale: Run) -> None:
    """Also the four that are the default, if they are asked for."""
    text = ("--data", "corpus", "--block-size", 32, "--batch-size", 8, "--tokens", 256, "--evaluations", 1)
    code, _, error = parscale("train", "retrofit", "--model", trained, "--output", "on", *text)
    assert code == 0, error
    assert json.loads((trained.parent / "on" / "train.json").read_text())["result"]["streams"]["streams"] == 2
    for flags in (("--streams", "4"), ("--streams=4",), ("--prefix_tokens", "48"), ("--no-plain-first",)):
        code, _, error = parscale("train", "retrofit", "--model", trained, "--output", "o", *text, *flags)
        assert (code, "has streams of its own" in error) == (2, True), flags
    (trained.parent / "four.yaml").write_text("streams: 4\n")
    code, _, error = parscale("train", "retrofit", "--recipe", "four.yaml", "--model", trained, "--output", "o", *text)
    assert (code, "has streams of its own" in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "retrofit", "--output", "o", "--model", "./nowhere"), "nowhere"),
        (("train", "pretrain", "--output", "o", "--data", "./nothing-here"), "nothing-here"),
        (("train", "pretrain", "--output", "o", "--prefix-tokens", "-1"), "prefix_tokens=-1"),
        (("train", "retrofit", "--output", "o"), "give --model FOLDER"),
        (("generate", "./nowhere", "hello"), "nowhere"),
        (("probe", "./nowhere"), "nowhere"),
        (("demo", "--streams", "1"), "streams=(1,)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple, named: str, folder: Path, parscale: Run) -> None:
    code, _, error = parscale(*arguments)
    assert code == 2
    assert error.strip().count("\n") == 0
    assert named in error
    assert not (folder / "o").exists()


def test_a_process_ends_with_the_exit_code() -> None:
    command = [sys.executable, "-m", "parscale", "generate", "./nowhere", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("parscale: model './nowhere'")
    assert done.stderr.count("\n") == 1


def test_the_version_names_what_a_report_needs(parscale: Run) -> None:
    code, said, _ = parscale("--version")
    assert code == 0
    assert said == (
        f"parscale {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}\n"
    )


def test_a_truncated_checkpoint_is_one_line(trained: Path, folder: Path, parscale: Run) -> None:
    broken = folder / "broken"
    broken.mkdir()
    for file in trained.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    code, _, error = parscale("generate", broken, "hello")
    assert code == 2
    assert error.strip().count("\n") == 0
    assert "broken" in error


def test_a_config_with_unknown_keys_is_one_line(trained: Path, folder: Path, parscale: Run) -> None:
    odd = folder / "odd"
    odd.mkdir()
    for file in trained.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"parscale": {"sterams": 3}}))
    code, _, error = parscale("generate", odd, "hello")
    assert code == 2
    assert error.strip().count("\n") == 0
    assert "sterams" in error
