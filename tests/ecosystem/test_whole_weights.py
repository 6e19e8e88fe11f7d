"""A checkpoint that lacks tensors, has others, or has values that are no numbers is refused by name, in every verb.

transformers starts at random what is missing, and only warns.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import parscale
from parscale import InputError, StreamsConfig, parallelize, save_streams
from parscale.cli import main
from parscale.train.data import train_tokenizer
from tests import gguf_files
from tests.contract.families import FAMILIES, Family
from tests.small import build, with_streams

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

Tensors = dict[str, Tensor]
IDS = torch.arange(3, 9)[None]
FILE = "model.safetensors"
EXTRA = "model.layers.9.other.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def edit(folder: Path, change: Callable[[Tensors], Any], file: str = FILE) -> Path:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def misshape(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(7)})


def spoil(name: str, value: float = float("nan")) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return change


def refusal(load: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as refused:
        load()
    assert "\n" not in str(refused.value)
    return str(refused.value)


STREAMS: dict[str, dict[str, Any] | None] = {
    "plain": None, "own": {}, "shared": {"kv": "shared", "diversify": ("prefix", "lora")},
    "rank1": {"diversify": ("embedding", "rank1"), "prefix_tokens": 0},
}  # fmt: skip
FAST = ("qwen2", "plain"), ("qwen2", "own"), ("mixtral", "plain")


@pytest.mark.parametrize(
    ("family", "streams"),
    [
        pytest.param(
            family,
            streams,
            id=f"{family.name}-{streams}",
            marks=[] if (family.name, streams) in FAST else [pytest.mark.slow],
        )
        for family in FAMILIES
        for streams in STREAMS
    ],
)
def test_every_kind_of_tensor(family: Family, streams: str, tmp_path: Path) -> None:
    """Tensors of each name in a layer, of the base and of the streams; the whole checkpoint loads as it was saved."""
    if streams == "shared" and family.recurrent:
        pytest.skip("a recurrent state is not shared")
    model = family.build()
    if (settings := STREAMS[streams]) is not None:
        parallelize(model, StreamsConfig(2, **{"prefix_tokens": 4} | settings))
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / FILE)
    assert torch.equal(parscale.load(tmp_path).eval()(IDS).logits, model.eval()(IDS).logits)
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()): name for name in whole}
    for name in kinds.values():
        for change, told in ((drop(name), "lacks"), (misshape(name), "(7,) instead of"), (spoil(name), "NaN")):
            if whole[name].is_floating_point() or told != "NaN":
                save_file(whole, tmp_path / FILE, metadata={"format": "pt"})
                words = refusal(lambda: parscale.load(edit(tmp_path, change)))  # noqa: B023 (called at once)
                assert told in words
                stacked = told == "NaN" and ".experts." in name  # transformers makes one tensor of all experts
                # and calls some modules by another name than the file does
                assert ".experts." in words if stacked else ".".join(name.split(".")[-2:]) in words
    save_file(whole | {EXTRA: torch.ones(3)}, tmp_path / FILE, metadata={"format": "pt"})
    assert f"unexpected {EXTRA}" in refusal(lambda: parscale.load(tmp_path))


TIED = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: None, id="one of two"),
        pytest.param(lambda t: t.update({TIED[1]: t[TIED[0]].clone()}), id="both"),
        pytest.param(lambda t: t.update({TIED[1]: t.pop(TIED[0])}), id="the other one"),
    ],
)
def test_tied_tensors_need_not_be_there_twice(change: Callable[[Tensors], Any], tmp_path: Path) -> None:
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(parscale.load(edit(tmp_path, change))(IDS).logits, model(IDS).logits)


def test_tied_tensors_must_be_there_once(tmp_path: Path) -> None:
    build(tie_word_embeddings=True).save_pretrained(tmp_path)
    words = refusal(lambda: parscale.load(edit(tmp_path, drop(TIED[0]))))
    assert all(name in words for name in TIED)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("qwen2", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.1.attn.bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)
def test_buffers_that_older_files_have_are_passed_over(family: str, buffers: list[str], tmp_path: Path) -> None:
    """gpt2 on the hub has causal masks among its weights, and pythia has."""
    model = next(one for one in FAMILIES if one.name == family).build()
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({name: torch.ones(1, 1, 4, 4) for name in buffers}))
    assert torch.equal(parscale.load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_value_that_is_no_number_is_found(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    build().to(dtype).save_pretrained(tmp_path)
    assert UP in refusal(lambda: parscale.load(edit(tmp_path, spoil(UP, value))))


def test_the_largest_numbers_are_numbers(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    parscale.load(edit(tmp_path, lambda t: t[UP].fill_(torch.finfo(torch.float32).max)))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streams"])
@pytest.mark.parametrize("damage", ["tensor", "shard", "elsewhere", "above", "json", "list", "no map", "numbers"])
def test_sharded_checkpoints(damage: str, streams: bool, tmp_path: Path) -> None:
    model = with_streams(build()) if streams else build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    assert torch.equal(parscale.load(tmp_path).eval()(IDS).logits, model(IDS).logits)
    shard = index["weight_map"][UP]
    if damage == "tensor":
        edit(tmp_path, drop(UP), shard)
    elif damage == "shard":
        (tmp_path / shard).unlink()
    else:
        changed = {
            "elsewhere": index | {"weight_map": index["weight_map"] | {UP: "absent.safetensors"}},
            "above": index | {"weight_map": index["weight_map"] | {UP: "../../absent.safetensors"}},
            "list": [], "no map": {}, "numbers": {"metadata": 1, "weight_map": {UP: 5}},
        }  # fmt: skip
        (tmp_path / INDEX).write_text(json.dumps(changed[damage]) if damage in changed else "{")
    words = refusal(lambda: parscale.load(tmp_path))
    assert str(tmp_path) in words
    assert damage != "tensor" or UP in words


def test_pickles_are_not_read(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / FILE).unlink()
    assert "safetensors" in refusal(lambda: parscale.load(tmp_path))


def test_the_base_of_adapters(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    save_streams(with_streams(parscale.load(tmp_path / "base")), tmp_path / "adapter")
    for change, told in ((drop(UP), f"lacks {UP}"), (spoil(UP), f"infinite, in {UP}")):
        build().save_pretrained(tmp_path / "base")
        edit(tmp_path / "base", change)
        words = refusal(lambda: parscale.load(tmp_path / "adapter"))
        assert told in words
        assert "of its base" in words


def test_streams_that_are_no_numbers(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    save_streams(with_streams(parscale.load(tmp_path / "base")), tmp_path / "adapter")
    name = "model.layers.0.self_attn.prefix_k"
    edit(tmp_path / "adapter", spoil(name), "streams.safetensors")
    plain = build()
    assert name in refusal(lambda: parscale.load_streams(plain, tmp_path / "adapter"))
    assert not hasattr(plain, "streams")
    assert name in refusal(lambda: parscale.load(tmp_path / "adapter"))


@pytest.mark.parametrize("beside", [True, False], ids=["beside a model", "alone"])
@pytest.mark.parametrize("damage", ["of the base", "of the LoRA", "no number", "none"])
def test_a_lora(damage: str, beside: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    build().save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(parscale.load(tmp_path / "base"), settings)
    folder, base = tmp_path / "lora", tmp_path / "base"
    model.save_pretrained(folder)
    if beside:
        build().save_pretrained(folder)
        base = folder
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if damage == "none":
        torch.testing.assert_close(parscale.load(folder).eval()(IDS).logits, model.eval()(IDS).logits)
        return
    if damage == "of the base":
        edit(base, drop(UP))
    else:
        edit(folder, drop(name) if damage == "of the LoRA" else spoil(name), "adapter_model.safetensors")
    words = refusal(lambda: parscale.load(folder))
    assert {"of the base": f"lacks {UP}", "of the LoRA": "1 tensors are missing", "no number": "NaN"}[damage] in words


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_gguf(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gguf_files.model("qwen2")
    state = source.state_dict()
    if damage == "nan":
        state[UP].view(-1)[-1] = float("nan")
    elif damage == "shape":
        state[UP] = torch.ones(96, 32)
    else:
        del state[UP]
    monkeypatch.setattr(source, "state_dict", lambda: state)
    file = gguf_files.write(tmp_path / "m.gguf", source)
    assert UP in refusal(lambda: parscale.load(file))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torchao
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize(
    ("change", "told"),
    [(drop(UP), f"lacks {UP}"), (misshape(UP), f"{UP} (7,) instead of"), (spoil(UP), "NaN"), (None, "")],
    ids=["missing", "shape", "nan", "whole"],
)
def test_in_few_bits(quantize: str, change: Any, told: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes" if torch.cuda.is_available() else "torchao")
    build(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    if change is None:
        assert parscale.load(tmp_path, quantize=quantize)(IDS).logits.isfinite().all()
    else:
        assert told in refusal(lambda: parscale.load(edit(tmp_path, change), quantize=quantize))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and models with tokenizers: plain and with streams, each without a tensor (`short…`) and with NaN."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return {i} * x ** {i % 7}\n" for i in range(90)))
    tokenizer = train_tokenizer([(folder / "text.txt").read_text()], 300)
    streams = {"kv": "shared", "diversify": ("prefix", "lora")}
    for kind, change in (("short", drop(UP)), ("nan", spoil(UP))):
        for name, make in (("plain", lambda model: model), ("streams", lambda model: with_streams(model, **streams))):
            made = folder / f"{kind}-{name}"
            make(build(vocab_size=len(tokenizer))).save_pretrained(made)
            tokenizer.save_pretrained(made)
            edit(made, change)
    return folder


TEXT = ("--data", "text.txt", "--block-size", "16")
VERBS = {
    "generate": ("def ", "--max-new-tokens", "2"),
    "eval": TEXT,
    "probe": TEXT,
    "pilot": (*TEXT, "--out", "out"),
    "merge-first": ("--out", "out"),
    "export": ("--out", "out", "--to", "onnx"),
    "serve": ("--port", "0"),
    "train": ("--output", "out", "--batch-size", "2", "--tokens", "64", *TEXT),
}


@pytest.mark.parametrize("kind", ["short", "nan"])
@pytest.mark.parametrize("model", ["plain", "streams"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses(
    verb: str, model: str, kind: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = {"export": "onnxscript", "serve": "uvicorn"}.get(verb)
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{verb} needs {needs}")
    monkeypatch.chdir(models)
    monkeypatch.setenv("PARSCALE_CACHE", str(models / "cache"))
    name = f"{kind}-{model}"
    named = ("retrofit", "--model", name) if verb == "train" else (name,)
    assert main([verb, *named, *VERBS[verb]]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), UP in error) == ("", 1, True), error
    assert not (models / "out").exists()


def test_a_control_that_is_not_whole(models: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(models)
    tokenizer = parscale.load_tokenizer("nan-plain")
    with_streams(build(vocab_size=len(tokenizer))).save_pretrained("whole")
    tokenizer.save_pretrained("whole")
    for control in ("short-plain", "nan-plain"):
        assert main(["probe", "whole", "--control", control, *TEXT]) == 2
        assert UP in capsys.readouterr().err
