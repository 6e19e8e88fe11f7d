"""A small model with two streams, trained for one step."""

from pathlib import Path
from typing import Any

import pytest

from parscale.config import StreamsConfig
from parscale.train.config import TrainConfig
from parscale.train.trainer import train
from tests.corpora import write_corpus


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    settings: dict[str, Any] = {"vocab_size": 384, "block_size": 32, "batch_size": 8, "tokens": 256, "evaluations": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARSCALE_CACHE", str(folder / "cache"))
        data = (str(write_corpus(folder / "corpus")),)
        train(TrainConfig("pretrain", folder / "m", "pico", StreamsConfig(2, 8), data=data, **settings))
    return folder / "m"
