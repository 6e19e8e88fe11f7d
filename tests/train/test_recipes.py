"""Recipes: what they set, that flags win over them, and what is refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest

from parscale import cli
from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.train import report
from parscale.train.config import TrainConfig
from parscale.train.recipes import FOLDER, read_recipe

SHIPPED = sorted(file.stem for file in FOLDER.glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The runs that the command line asks for, which are not done."""
    runs: list[TrainConfig] = []
    monkeypatch.setattr(report, "run", runs.append)
    return runs


def test_every_stage_has_a_recipe() -> None:
    assert SHIPPED == ["frozen", "pretrain", "retrofit", "sft"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_of_the_package_is_a_run_of_its_stage(name: str) -> None:
    config = TrainConfig(output=Path("out"), **read_recipe(name))
    assert config.stage == name
    if name != "sft":
        assert (config.streams.streams, config.streams.diversify) == (4, ("prefix", "lora"))
    assert read_recipe(FOLDER / f"{name}.yaml") == read_recipe(name)


def test_numbers_without_a_point_are_numbers(recipe) -> None:
    path = recipe("tokens: 1e6\nlearning_rate: 3e-4\nmix: [1, 2e0]\ndata: [a, b]\nstreams: 2\nload_balance: 1e-2\n")
    values = read_recipe(path)
    assert (values["tokens"], values["learning_rate"], values["mix"]) == (1_000_000, 3e-4, (1.0, 2.0))
    assert isinstance(values["tokens"], int)
    assert values["streams"] == StreamsConfig(2)
    assert values["balance"].load_balance == 0.01


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rte: 1e-3", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("prefix-tokens: 3", "did you mean 'prefix_tokens'?"),
        ("zzz: 1", "unknown key 'zzz'; known are "),
        ("tokens: 1.5", "tokens=1.5 is not accepted; give a whole number"),
        ("tokens: many", "tokens='many' is not accepted; give a whole number"),
        ("batch_size: true", "batch_size=True is not accepted; give a whole number"),
        ("schedule: linear", "schedule='linear' is not accepted; give one of ('wsd', 'cosine')"),
        ("control: 1", "control=1 is not accepted; give true or false"),
        ("diversify: [prefix, lorra]", "diversify=['prefix', 'lorra'] is not accepted; give a list of one of"),
        ("streams: 0", "streams=0 is not accepted"),
        ("- a", "give keys and values"),
        ("a: b: c", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(recipe, text: str, named: str) -> None:
    with pytest.raises(InputError) as raised:
        read_recipe(recipe(text))
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_recipe_that_is_missing_is_told_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="'retrofitt': there is no such file; those that come along are frozen, pret"):
        read_recipe("retrofitt")


def test_flags_win_over_a_recipe_and_a_recipe_over_defaults(recipe, asked) -> None:
    path = recipe("tokens: 2e6\nbatch_size: 4\nblock_size: 8\nstreams: 2\ndiversify: [lora]\ncontrol: true")
    arguments = ["--recipe", str(path), "--output", "o", "--tokens", "1e6", "--lora-rank", "3", "--no-control"]
    assert cli.main(["train", "retrofit", *arguments]) == 0
    (config,) = asked
    assert (config.stage, config.tokens, config.batch_size, config.control) == ("retrofit", 1_000_000, 4, False)
    assert config.streams == StreamsConfig(2, diversify=("lora",), lora_rank=3)
    assert config.warmup == TrainConfig("retrofit", Path("o")).warmup


def test_a_recipe_may_say_the_stage(asked) -> None:
    assert cli.main(["train", "--recipe=frozen", "--output", "o"]) == 0
    assert asked[0].stage == "frozen"
    assert asked[0] == TrainConfig(output=Path("o"), **read_recipe("frozen"))


def test_without_a_recipe_stage_and_output_are_required(asked, capsys) -> None:
    assert cli.main(["train", "--output", "o"]) == 2
    assert cli.main(["train", "--recipe", "frozen"]) == 2
    assert asked == []
    assert cli.main(["train", "retrofit", "--output", "o", "--streams", "2"]) == 0
    assert asked == [TrainConfig("retrofit", Path("o"), streams=StreamsConfig(2))]


def test_a_wrong_recipe_is_one_line_and_exit_code_2(recipe, asked, capsys) -> None:
    assert cli.main(["train", "--recipe", str(recipe("warmpu: 0.1")), "--output", "o"]) == 2
    assert "did you mean 'warmup'?" in capsys.readouterr().err
    assert asked == []


def test_every_key_is_a_flag(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for field in [*fields(TrainConfig), *fields(StreamsConfig)]:
        assert field.name == "balance" or f"--{field.name.replace('_', '-')}" in shown or field.name == "stage"
