"""What `parscale export --to openvino` writes, run by openvino-genai as it comes; needs the extra `openvino`.

openvino-genai turns the graph into its paged attention, which drops a cache that is not empty at the start: these tests
run that backend, on a model whose tokens change when its prefix is lost.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from parscale.cli import main
from parscale.export.run import export_model
from parscale.load import load_tokenizer
from tests.export.conftest import NEW, greedy, without_prefix_values
from tests.serve.processes import byte_tokenizer, save, small_model

genai = pytest.importorskip("openvino_genai", reason="the extra 'openvino' is not installed")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def pipeline(folder: Path, backend: str) -> Any:
    return genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **EXACT)


def generated(folder: Path, prompts: list[Tensor], backend: str, placeholders: list[int]) -> list[list[int]]:
    import openvino

    pipe = pipeline(folder, backend)
    config = genai.GenerationConfig(max_new_tokens=NEW, ignore_eos=True, do_sample=False)
    found = []
    for prompt in prompts:
        ids = np.array([placeholders + prompt.tolist()], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        found.append(list(pipe.generate(inputs, config).tokens[0]))
    return found


def placeholders_of(folder: Path) -> list[int]:
    return load_tokenizer(folder)("")["input_ids"]


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(trained, tmp_path_factory.mktemp("openvino") / "out", engine="openvino").folder


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_tokens_are_those_of_torch(trained: Path, exported: Path, prompts: list[Tensor], backend: str) -> None:
    placeholders = placeholders_of(exported)
    assert len(placeholders) == 16
    expected = greedy(trained, prompts)
    assert generated(exported, prompts, backend, placeholders) == expected
    assert greedy(trained, prompts, change=without_prefix_values) != expected  # the prefix was not dropped


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_without_placeholders_no_text_comes(exported: Path, prompts: list[Tensor], backend: str) -> None:
    for tokens in generated(exported, prompts, backend, []):
        assert len(set(tokens)) == 1  # of scores that are no numbers


@pytest.mark.parametrize("streams", [1, 2])
def test_fewer_streams(trained: Path, prompts: list[Tensor], streams: int, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "out", engine="openvino", streams=streams)
    placeholders = placeholders_of(tmp_path / "out")
    assert generated(tmp_path / "out", prompts, "PA", placeholders) == greedy(trained, prompts, streams)


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_shared_keys_and_values(trained_shared: Path, prompts: list[Tensor], backend: str, tmp_path: Path) -> None:
    export_model(trained_shared, tmp_path / "out", engine="openvino")
    placeholders = placeholders_of(tmp_path / "out")
    assert generated(tmp_path / "out", prompts, backend, placeholders) == greedy(trained_shared, prompts)


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_text_gets_its_placeholders(trained: Path, exported: Path, backend: str) -> None:
    tokenizer = load_tokenizer(trained)
    text = "def main(argv):\n    return"
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    expected = tokenizer.decode(greedy(trained, [ids])[0])
    found = pipeline(exported, backend).generate(text, max_new_tokens=NEW, ignore_eos=True, do_sample=False)
    assert str(found) == expected


def test_a_chat_gets_its_placeholders(trained: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(trained)
    try:
        export_model(trained, tmp_path / "out", engine="openvino")
    finally:
        (trained / "chat_template.jinja").unlink(missing_ok=True)
    pipe = pipeline(tmp_path / "out", "PA")
    history = [{"role": "user", "content": "import os"}]
    seen = pipe.get_tokenizer().apply_chat_template(history, add_generation_prompt=True)
    ids = pipe.get_tokenizer().encode(seen, add_special_tokens=False).input_ids.data[0].tolist()
    placeholders = placeholders_of(tmp_path / "out")
    assert ids == placeholders + tokenizer("import os\n")["input_ids"]


@pytest.mark.parametrize(
    ("ends", "name", "found"),
    [([7, 9], "<end>", {7, 9}), (None, "<end>", {256}), (None, None, {-1})],
    ids=str,
)
def test_stop_tokens_are_those_of_serving(
    ends: list[int] | None, name: str | None, found: set[int], tmp_path: Path
) -> None:
    model, tokenizer = small_model(), byte_tokenizer()
    model.generation_config.eos_token_id, tokenizer.eos_token = ends, name
    save(tmp_path / "model", model, tokenizer)
    out = export_model(tmp_path / "model", tmp_path / "out", engine="openvino").folder
    assert pipeline(out, "PA").get_generation_config().stop_token_ids == found


@pytest.mark.parametrize(("weights", "worse"), [("float32", 1.0001), ("int8", 1.02), ("int4", 1.3)])
def test_perplexity_of_few_bits(
    trained: Path, corpus: Path, weights: str, worse: float, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / weights
    settings = ("--data", str(corpus), "--block-size", "64", "--json")
    assert main(["export", str(trained), "--to", "openvino", "--weights", weights, "--out", str(out), *settings]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 1 / worse < told["perplexity"] / told["perplexity_float32"] < worse


def test_int4_where_no_group_is_filled(
    trained_shared: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of rank 4 has matrices of 4 inputs; they stay in int8."""
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"data": (str(corpus),), "block_size": 64}
    told = export_model(trained_shared, tmp_path / "out", engine="openvino", weights="int4", **options)
    assert told.perplexity is not None
    assert told.perplexity_float32 is not None
    assert 1 / 1.3 < told.perplexity / told.perplexity_float32 < 1.3
    precisions = (tmp_path / "out" / "openvino_model.xml").read_text()
    assert 'element_type="i4"' in precisions
