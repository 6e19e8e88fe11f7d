"""Several corpora: shares of the mix, what is held out of each, and their losses in a run's report."""

from collections import Counter
from pathlib import Path

import pytest

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.train.config import TrainConfig
from parscale.train.mix import load_mix
from parscale.train.prepare import FORGETTING, prepare
from parscale.train.trainer import train
from tests.train.conftest import run


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    """Two folders of documents whose texts have no letter in common; one document stands in both."""
    for name, letter, count in (("many", "a", 60), ("few", "b", 12)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_text(f"{letter}{number} " * 40)
    (tmp_path / "few" / "shared.txt").write_text((tmp_path / "many" / "7.txt").read_text())
    return str(tmp_path / "many"), str(tmp_path / "few")


@pytest.fixture
def load(corpora, tmp_path: Path):
    return lambda weights, **options: load_mix(
        corpora, weights, **{"block_size": 16, "vocab_size": 300, "cache_dir": tmp_path / "cache"} | options
    )


def letters(text, blocks) -> Counter[str]:
    """How many blocks are of which corpus, told by its letter."""
    decoded = (text.tokenizer.decode(ids) for ids in blocks["input_ids"][:])
    return Counter("ab"["b" in one] for one in decoded)


def rows_of(text) -> set[tuple[int, ...]]:
    return set(map(tuple, text.train["input_ids"][:].tolist()))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 3.0)])
def test_blocks_come_by_weight_and_each_at_least_once(load, corpora, tmp_path, weights: tuple[float, float]) -> None:
    text = load(weights)
    drawn = letters(text, text.train)
    share = weights[0] / sum(weights)
    assert drawn["a"] / drawn.total() == pytest.approx(share, abs=0.05)
    many = load_mix(corpora[:1], [1.0], tokenizer=text.tokenizer, block_size=16, cache_dir=tmp_path)
    assert rows_of(many) <= rows_of(text)
    validation = letters(text, text.validation)
    assert set(validation) == {"a", "b"}


def test_the_order_is_the_seeds(load) -> None:
    one, same, other = (load((0.5, 0.5), seed=seed).train["input_ids"][:].tolist() for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_each_corpus_is_held_out_and_none_is_trained_on_elsewhere(load, corpora) -> None:
    text = load((0.5, 0.5))
    assert list(text.corpora) == ["many", "few"]
    assert [set(letters(text, blocks)) for blocks in text.corpora.values()] == [{"a"}, {"b"}]
    assert text.train_documents + text.validation_documents == 72  # the one that stands in both is there once


def test_a_corpus_within_another_is_refused(corpora, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all its documents are in the corpora before it"):
        load_mix([corpora[0], corpora[0]], [1, 1], block_size=16, cache_dir=tmp_path)


def test_a_run_tells_the_loss_of_each_corpus(corpora, tmp_path: Path) -> None:
    settings = {"data": corpora, "mix": (0.8, 0.2), "forgetting": (corpora[0],), "vocab_size": 300}
    config = run("pretrain", tmp_path / "out", streams=StreamsConfig(1, 0), cache_dir=tmp_path, **settings)
    result = train(config)
    assert set(result.corpora) == {"many", "few", FORGETTING}
    assert all(losses["after"] < losses["before"] for losses in result.corpora.values())
    # forgetting reads the same documents with the same split as the first corpus
    assert result.corpora["many"] == pytest.approx(result.corpora[FORGETTING], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mix": (1.0,)}, "give one weight above 0 for each of the 2"),
        ({"mix": (1.0, 0.0)}, "give one weight above 0"),
        ({"mix": (1.0, 1.0), "validation": ("x",)}, "with mix"),
        ({"mix": (1.0, 1.0), "streaming": True}, "mix with streaming"),
        ({"validation": ("x",), "streaming": True}, "with streaming"),
    ],
)
def test_what_does_not_go_together_is_refused(corpora, changes: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        prepare(TrainConfig("pretrain", Path("out"), data=corpora, **changes))
