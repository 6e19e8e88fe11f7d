"""Small trained models of the families that fold, and prompts for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from parscale.config import StreamsConfig
from parscale.load import load_model
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText, load_text
from parscale.train.trainer import train
from tests.corpora import write_corpus

NEW = 24
LENGTHS = (2, 5, 9, 17, 23, 31)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedText:
    return load_text(corpus, vocab_size=384, block_size=32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def trained(text: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with grouped-query attention and four streams, trained for 60 steps of 8 × 32 tokens."""
    return pretrain("qwen2", StreamsConfig(4, 16), text, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def trained_shared(text: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose three streams share keys, values and prefix, and are told apart by LoRA and scales."""
    streams = StreamsConfig(3, 16, diversify=("prefix", "lora", "rank1"), lora_rank=4, kv="shared", shared_prefix=True)
    return pretrain("llama", streams, text, tmp_path_factory.mktemp("llama"))


def pretrain(family: str, streams: StreamsConfig, text: PackedText, folder: Path) -> Path:
    config = AutoConfig.for_model(
        family, vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.06,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder / "shape")
    settings: dict[str, Any] = {"block_size": 32, "batch_size": 8, "validation_blocks": 16, "tokens": 60 * 256}
    train(
        TrainConfig("pretrain", folder / "model", model=str(folder / "shape"), streams=streams, **settings), data=text
    )
    return folder / "model"


@pytest.fixture(scope="session")
def prompts(text: PackedText) -> list[Tensor]:
    """Token ids (T,) of held-out text."""
    return [torch.as_tensor(text.validation[i]["input_ids"])[:length] for i, length in enumerate(LENGTHS)]


def greedy(folder: Path, prompts: list[Tensor], streams: int | None = None, change: Any = None) -> list[list[int]]:
    """What transformers generates in float32, one prompt at a time, without stopping."""
    model = load_model(folder, dtype=torch.float32).eval()
    if streams is not None:
        model.set_streams(streams)
    if change is not None:
        change(model)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return [
        model.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p) :].tolist()
        for p in prompts
    ]


@torch.no_grad()
def without_prefix_values(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "prefix_v"):
            module.prefix_v.zero_()
