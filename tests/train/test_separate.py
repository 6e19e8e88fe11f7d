"""Documents that share a block, against each of them alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model
from parscale.train.data import PackedText, load_text
from parscale.train.separate import SeparateDocuments, check_separate, collator, document_starts
from parscale.train.trainer import train
from tests.small import VOCABULARY, build, with_streams
from tests.train.conftest import run

END = 1
FAMILIES = {
    "qwen2": {},
    "llama, eager": {"attn_implementation": "eager"},
    "mistral, sliding window": {"sliding_window": 4},
    "gpt2, positions learned": {},
}


def documents(*lengths: int) -> list[Tensor]:
    """Token ids of documents, each ending in END."""
    return [torch.cat([torch.randint(2, VOCABULARY, (length - 1,)), torch.tensor([END])]) for length in lengths]


def batch_of(*rows: list[Tensor]) -> dict[str, Tensor]:
    ids = [torch.cat(row) for row in rows]
    return SeparateDocuments(END)([{"input_ids": one, "labels": one} for one in ids])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("streams", [{}, {"diversify": ("prefix", "lora")}, {"streams": 1}], ids=["P=4", "lora", "P=1"])
def test_packed_documents_are_what_they_are_alone(family: str, streams: dict) -> None:
    model = with_streams(build(family.partition(",")[0], **FAMILIES[family]).double(), **streams)
    rows = [documents(7, 1, 9, 3), documents(12, 8)]
    batch = batch_of(*rows)
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
        alone = [[model(document[None], use_cache=False).logits[0] for document in row] for row in rows]
    expected = torch.stack([torch.cat(row) for row in alone])
    # eager attention takes its softmax in float32, whatever the model is in
    torch.testing.assert_close(packed.logits, expected, rtol=0, atol=1e-5 if "eager" in family else 1e-12)

    losses = [
        F.cross_entropy(logits[:-1], document[1:], reduction="none")
        for row, logits_of_row in zip(rows, alone, strict=True)
        for document, logits in zip(row, logits_of_row, strict=True)
    ]
    # transformers takes the loss in float32
    assert packed.loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_families_whose_documents_see_each_other_are_refused() -> None:
    """Attention that makes its mask without positions, and layers with a recurrent state."""
    check_separate(with_streams(build("qwen3")), END)
    for model in (with_streams(build("gpt_oss")), build("gpt_oss"), build("qwen3_next")):
        with pytest.raises(InputError, match=f"of the family '{model.config.model_type}'"):
            check_separate(model, END)


def test_joined_documents_are_not(seed: None) -> None:
    """The test above would not pass if documents saw each other."""
    model = with_streams(build().double())
    (row,) = rows = [documents(7, 9)]
    joined = batch_of(*rows) | {"position_ids": None}
    with torch.no_grad():
        logits, alone = (model(ids, use_cache=False).logits for ids in (joined["input_ids"], row[1][None]))
    assert (logits[:, 7:] - alone).abs().max() > 1e-3


def test_a_block_that_begins_within_a_document() -> None:
    ids = torch.tensor([[5, 6, END, 7, END, END, 8]])
    starts = document_starts(ids, END)
    assert starts.tolist() == [[True, False, False, True, False, True, True]]
    batch = SeparateDocuments(END)([{"input_ids": ids[0], "labels": ids[0]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, END, -100, END, -100, -100]]


def test_a_run_trains_and_measures_separate_documents(base: Path, text: PackedText, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(200):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"def function_{number}(self):\n    return {number}\n")
    joined = load_text(tmp_path / "corpus", tokenizer=text.tokenizer, block_size=32, cache_dir=tmp_path)
    separate = replace(joined, end_of_text=text.tokenizer.eos_token_id)
    assert isinstance(collator(separate), SeparateDocuments)
    config = run("frozen", tmp_path / "out", model=str(base), streams=StreamsConfig(2, 4), batch_size=3, tokens=1024)
    result = train(config, data=separate)
    model = load_model(tmp_path / "out").eval()
    rows = [separate.validation[index] for index in range(min(16, len(separate.validation)))]
    with torch.no_grad():
        separate_loss = model(**collator(separate)(rows), use_cache=False).loss.item()
        joined_loss = model(**collator(joined)(rows), use_cache=False).loss.item()
    assert result.validation_loss == pytest.approx(separate_loss, abs=1e-5)
    assert abs(separate_loss - joined_loss) > 1e-4
