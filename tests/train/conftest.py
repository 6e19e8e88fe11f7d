"""Text and a trained model that the tests of training share."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from parscale.config import StreamsConfig
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText, load_text
from parscale.train.trainer import train
from tests.corpora import write_corpus


@pytest.fixture(scope="session", autouse=True)
def sigterm() -> Iterator[None]:
    """A SIGTERM that comes from outside is for pytest, not for the run that a test has in hand: that would stop with
    status 0, the test would fail for no reason of its own, and pytest would go on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parscale.train.trainer.catching_sigterm", lambda event: nullcontext())
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedText:
    return load_text(corpus, vocab_size=384, block_size=32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def base(text: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, trained for 40 steps of 8 × 32 tokens."""
    output = tmp_path_factory.mktemp("models") / "base"
    train(run("pretrain", output, model="nano", streams=StreamsConfig(1, 0), tokens=40 * 256), data=text)
    return output


def run(stage: str, output: Path, **changes: object) -> TrainConfig:
    """A run small enough for a test."""
    settings: dict = {"model": "nano", "block_size": 32, "batch_size": 8, "validation_blocks": 16, "tokens": 5 * 256}
    return TrainConfig(stage, output, **(settings | changes))  # type: ignore[arg-type]
