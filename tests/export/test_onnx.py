"""What `parscale export --to onnx` writes, run by onnxruntime-genai as it comes; needs the extra `onnx`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from parscale.cli import main
from parscale.errors import InputError
from parscale.export.onnx import OnnxLogits
from parscale.export.run import export_model
from parscale.load import load_tokenizer
from tests.export.conftest import NEW, greedy, without_prefix_values
from tests.serve.processes import byte_tokenizer, save, small_model

genai = pytest.importorskip("onnxruntime_genai", reason="the extra 'onnx' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")


def generated(folder: Path, prompts: list[Tensor]) -> list[list[int]]:
    model = genai.Model(str(folder))
    found = []
    for prompt in prompts:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + NEW, min_length=len(prompt) + NEW, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(prompt.numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append(generator.get_sequence(0)[len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(trained, tmp_path_factory.mktemp("onnx") / "out", engine="onnx").folder


def test_tokens_are_those_of_torch(trained: Path, exported: Path, prompts: list[Tensor]) -> None:
    expected = greedy(trained, prompts)
    assert generated(exported, prompts) == expected
    assert greedy(trained, prompts, change=without_prefix_values) != expected  # else nothing was shown


@pytest.mark.parametrize("streams", [1, 2])
def test_fewer_streams(trained: Path, prompts: list[Tensor], streams: int, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "out", engine="onnx", streams=streams)
    assert generated(tmp_path / "out", prompts) == greedy(trained, prompts, streams)


def test_shared_keys_and_values(trained_shared: Path, prompts: list[Tensor], tmp_path: Path) -> None:
    export_model(trained_shared, tmp_path / "out", engine="onnx")
    assert generated(tmp_path / "out", prompts) == greedy(trained_shared, prompts)
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (3 * 4, 2)


def test_its_tokenizer_gives_the_same_tokens(trained: Path, exported: Path) -> None:
    text = "def main():\n    return {'naïve': 1}\n"
    tokenizer = genai.Tokenizer(genai.Model(str(exported)))
    assert tokenizer.encode(text).tolist() == load_tokenizer(trained)(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("weights", "worse"), [("float32", 1.0001), ("int8", 1.02), ("int4", 1.3)])
def test_perplexity_of_few_bits(
    trained: Path, corpus: Path, weights: str, worse: float, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / weights
    settings = ("--data", str(corpus), "--block-size", "64", "--json")
    assert main(["export", str(trained), "--to", "onnx", "--weights", weights, "--out", str(out), *settings]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 1 / worse < told["perplexity"] / told["perplexity_float32"] < worse
    assert told["tokens"] >= 8 * 63
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    products = 2 * 7 + 3  # two layers, the aggregation head and the LM head
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == (0 if weights == "float32" else products)


def stopping(folder: Path, ends: int | list[int] | None, name: str | None) -> Path:
    """A model of random weights over 258 tokens whose generation_config and tokenizer name stop tokens, or do not."""
    model, tokenizer = small_model(), byte_tokenizer()
    model.generation_config.eos_token_id, tokenizer.eos_token = ends, name
    return save(folder, model, tokenizer)


@pytest.mark.parametrize(
    ("ends", "name", "written"),
    [([7, 9], "<end>", [7, 9]), (7, "<end>", [7]), (None, "<end>", [256]), (300, None, [258]), (None, None, [258])],
    ids=str,
)
def test_stop_tokens_are_those_of_serving(
    ends: int | list[int] | None, name: str | None, written: list[int], tmp_path: Path
) -> None:
    """And none is invented: token 258 is one more than the model has, and its logit the lowest number."""
    out = export_model(stopping(tmp_path / "model", ends, name), tmp_path / "out", engine="onnx").folder
    assert json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"] == written
    assert genai.Tokenizer(genai.Model(str(out))).eos_token_ids.tolist() == written
    never = OnnxLogits(out)(torch.arange(5))[:, 258:]
    assert never.shape[1] == (258 in written)
    assert (never == torch.finfo(torch.float32).min).all()


def test_an_answer_ends_with_a_stop_token_and_with_no_other(tmp_path: Path) -> None:
    def answer(ends: list[int] | None, place: str) -> list[int]:
        folder = stopping(tmp_path / place / "model", ends, None)
        model = genai.Model(str(export_model(folder, tmp_path / place / "out", engine="onnx").folder))
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=100, do_sample=False, repetition_penalty=1.5)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([5, 6, 7, 8], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[4:].tolist()

    whole = answer(None, "none")
    assert len(whole) == 96
    assert 0 in whole  # which the engine takes for a stop token where none is named
    assert answer([300, whole[20]], "one") == whole[: whole.index(whole[20])]


def test_a_folder_in_use_is_left_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="holds something already"):
        export_model(trained, tmp_path, engine="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_a_failed_export(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(OSError, match="no space"):
        export_model(trained, tmp_path / "out", engine="onnx")
    assert not list(tmp_path.iterdir())
