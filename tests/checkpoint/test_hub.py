"""The hub: what is uploaded, what the card says, adapters by a repository's name. Nothing leaves the machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import parscale
from parscale import InputError
from parscale.load import load_model, load_tokenizer
from parscale.streams import hub
from tests.small import build, with_streams

FACTS = {"base": "someone/base", "tokens": 20_000_000, "loss": 2.5, "control_loss": 2.5625}


WORDS = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"def": 0, "?": 1}, unk_token="?")))


class Repository:
    """Stands for the hub's API: keeps what it is sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[tuple[str, bool | None]] = []

    def __call__(self, token: str | None = None) -> "Repository":
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        self.made.append((repo_id, private))

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        for file in Path(folder_path).iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())
        return f"commit of {repo_id}: {commit_message}"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository(tmp_path)
    monkeypatch.setattr(hub, "HfApi", made)
    return made


@pytest.mark.parametrize("streams_only", [False, True])
def test_what_is_pushed_loads_and_its_card_states_the_facts(
    repository: Repository, streams_only: bool, ids: Tensor
) -> None:
    model = with_streams(build())
    facts = FACTS | {"data": "novels", "license": "mit"}
    commit = parscale.push_to_hub(model, "someone/wide", facts, streams_only=streams_only, private=True)
    assert commit.startswith("commit of someone/wide")
    assert "P=4" in commit
    assert repository.made == [("someone/wide", True)]
    folder = repository.folder
    assert (folder / "model.safetensors").exists() != streams_only
    loaded = parscale.load_streams(build(), folder) if streams_only else AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.license == "mit"
    for row in (
        "| base model | `someone/base` |",
        "| P, streams | 4 |",
        "| tokens trained on | 20,000,000 |",
        "| held-out loss, nats per token | 2.5000 |",
        "| the control's: one stream with a prefix, the same tokens | 2.5625 |",
        "| gain over the control | +0.0625 |",
        "| data | novels |",
    ):
        assert row in card.text
    assert ('load_streams(model, "someone/wide")' in card.text) == streams_only


def test_a_loss_that_was_not_measured_is_said_so() -> None:
    card = hub.model_card(with_streams(build()), "someone/wide", FACTS | {"control_loss": None})
    assert "| gain over the control | not measured |" in card.text
    assert "data |" not in card.text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({k: v for k, v in FACTS.items() if k != "control_loss"}, r"lacks \['control_loss'\]"),
        (FACTS | {"perplexity": 3}, r"unknown \['perplexity'\]"),
    ],
)
def test_a_card_without_its_facts_is_refused(repository: Repository, facts: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parscale.push_to_hub(with_streams(build()), "someone/wide", facts)
    assert not repository.made


def test_a_model_without_streams_is_not_pushed(repository: Repository) -> None:
    with pytest.raises(InputError, match="no streams to publish"):
        parscale.push_to_hub(build(), "someone/plain", FACTS)
    assert not repository.made


COMMIT = "0" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Gives the folder of a repository in the hub's cache, as a download leaves it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def folder(name: str) -> Path:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        return repository / "snapshots" / COMMIT

    return folder


@pytest.fixture
def downloaded(hub_cache: Callable[[str], Path]) -> str:
    parscale.save_streams(with_streams(build()), hub_cache("someone/wide"))
    return "someone/wide"


def test_an_adapter_by_its_name(downloaded: str, ids: Tensor) -> None:
    for revision in (None, "main", COMMIT):
        model = parscale.load_streams(build(), downloaded, revision=revision)
        assert torch.equal(model(ids).logits, with_streams(build())(ids).logits)


@pytest.mark.parametrize("name", ["someone/absent", "no such folder", "a/b/c"])
def test_a_name_that_is_not_there(downloaded: str, name: str) -> None:
    with pytest.raises(InputError, match=name) as refused:
        parscale.load_streams(build(), name)
    assert "\n" not in str(refused.value)


def test_a_model_by_the_name_of_its_adapters(hub_cache: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    base = build()
    base.save_pretrained(tmp_path / "base")
    WORDS.save_pretrained(tmp_path / "base")
    streams = with_streams(load_model(tmp_path / "base"))
    parscale.save_streams(streams, hub_cache("someone/wide"))
    assert torch.equal(load_model("someone/wide")(ids).logits, streams(ids).logits)
    assert load_tokenizer("someone/wide").get_vocab() == WORDS.get_vocab(), "its base's"


def test_adapters_whose_base_is_themselves(hub_cache: Callable[[str], Path]) -> None:
    (hub_cache("someone/ring") / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/ring", "peft_type": "LORA"})
    )
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"someone.*ring"):
            load("someone/ring")


def test_a_pickle_on_the_hub_is_not_read(hub_cache: Callable[[str], Path], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    folder = hub_cache("someone/old")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"})
    )
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load_model("someone/old")
