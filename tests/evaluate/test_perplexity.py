"""`parscale eval` against the definition: −log p of every token after the first of its piece."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from parscale.cli import main
from parscale.errors import InputError
from parscale.evaluate.perplexity import bootstrap_of_documents, evaluate
from parscale.load import load_model, load_tokenizer


def test_the_loss_is_that_of_separate_passes(model: Path, tmp_path: Path) -> None:
    texts = {"a.txt": "def area(radius):\n    return 3 * radius ** 2\n" * 3, "b.txt": "import os\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (score,) = evaluate(str(model), [str(tmp_path)], block_size=16, tokens=10_000)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    nats, count = 0.0, 0
    for text in texts.values():
        for piece in torch.tensor(tokenizer(text)["input_ids"]).split(16):
            logs = loaded(piece[None]).logits[0].log_softmax(-1)
            nats -= sum(logs[i, token].item() for i, token in enumerate(piece[1:]))
            count += len(piece) - 1
    assert (score.documents, score.tokens) == (2, count)
    assert score.loss == pytest.approx(nats / count, rel=1e-4)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    tokens, size = (sum(map(length, texts.values())) for length in (lambda t: len(tokenizer(t)["input_ids"]), len))
    assert score.bits_per_byte == pytest.approx(score.loss * tokens / size / math.log(2))
    (fewer,) = evaluate(str(model), [str(tmp_path)], block_size=16, streams=1)
    assert fewer.loss != score.loss


def test_documents_that_tell_nothing_count_nowhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os\n" * 9)
    (alone,) = evaluate(str(model), [str(tmp_path)], block_size=16)
    for letter in "bcdefg":  # a token each
        (tmp_path / f"{letter}.txt").write_text(letter)
    assert evaluate(str(model), [str(tmp_path)], block_size=16) == [alone]


def test_the_interval_resamples_documents() -> None:
    low, high = bootstrap_of_documents(np.array([10.0, 40.0]), np.array([10, 20]))
    assert (low, high) == (1.0, 2.0)
    assert math.isnan(bootstrap_of_documents(np.array([1.0]), np.array([1]))[0])


def test_the_verb_prints_json_and_refuses_bad_numbers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("import os\n")
    assert main(["eval", str(model), "--data", str(tmp_path / "a.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["low"] is None  # one document has no interval
    assert main(["eval", str(model), "--streams", "9"]) == 2
    for flag in (["--limit", "1"], ["--shots", "0"], ["--execute"]):
        assert main(["eval", str(model), *flag]) == 2
        assert "an evaluation with data" in capsys.readouterr().err
    with pytest.raises(InputError, match="block_size=1"):
        evaluate(str(model), [str(tmp_path)], block_size=1)
