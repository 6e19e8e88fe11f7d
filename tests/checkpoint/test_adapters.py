"""Streams apart from their base: saved as megabytes, several on one frozen backbone, never on the wrong one."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import parscale
from parscale import InputError, StreamsConfig
from parscale.load import load_model
from parscale.streams.checkpoint import base_identity
from parscale.streams.tensors import stream_tensors
from tests.small import build, greedy, uncached, with_streams

WIDTHS: dict[int, dict[str, Any]] = {
    2: {"prefix_tokens": 3},
    4: {"prefix_tokens": 5, "diversify": ("prefix", "embedding", "lora", "rank1")},
    8: {"prefix_tokens": 0, "diversify": ("embedding",), "smoothing": 0.3},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Adapters for P = 2, 4, 8, of quite different kinds, for one base."""
    folders = {p: tmp_path_factory.mktemp(f"p{p}") for p in WIDTHS}
    for p, folder in folders.items():
        parscale.save_streams(widened(p), folder)
    return folders


def widened(p: int) -> Any:
    return with_streams(build(), streams=p, **WIDTHS[p])


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_an_adapter_and_its_base_are_the_model(saved: dict[int, Path], ids: Tensor) -> None:
    for p, folder in saved.items():
        base = build()
        assert parscale.load_streams(base, folder) is base
        assert torch.equal(logits(base, ids), logits(widened(p), ids))
        assert torch.equal(greedy(base, ids), uncached(base, ids))
        assert base.config.model_type == "qwen2_parscale"
        assert base.streams == p


def test_only_the_streams_are_written(saved: dict[int, Path]) -> None:
    for p, folder in saved.items():
        assert sorted(file.name for file in folder.iterdir()) == ["streams.json", "streams.safetensors"]
        full, plain = widened(p).state_dict(), build().state_dict()
        stored = load_file(folder / "streams.safetensors")
        assert stored.keys() == full.keys() - plain.keys()
        assert all(torch.equal(tensor, full[name]) for name, tensor in stored.items())


@torch.no_grad()
def test_several_on_one_backbone(saved: dict[int, Path], ids: Tensor) -> None:
    model, plain = build(), build()
    weights = dict(model.named_parameters())
    for p, folder in saved.items():
        parscale.load_streams(model, folder, name=f"p{p}")
    for p in (2, 8, 4, 4, 2):
        parscale.use_streams(model, f"p{p}")
        assert torch.equal(logits(model, ids), logits(widened(p), ids))
        assert torch.equal(greedy(model, ids[:1]), uncached(widened(p), ids[:1]))
        now = dict(model.named_parameters())
        assert all(now[name] is weight for name, weight in weights.items())
    parscale.use_streams(model, None)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert dict(model.named_parameters()).keys() == weights.keys()
    parscale.use_streams(model, "p8")
    assert torch.equal(logits(model, ids), logits(widened(8), ids))


def test_streams_that_a_model_came_with_are_kept(saved: dict[int, Path], ids: Tensor) -> None:
    model = widened(4)
    before = logits(model, ids)
    with pytest.raises(InputError, match=r"name='default' is taken.*another"):
        parscale.load_streams(model, saved[2])
    assert torch.equal(logits(model, ids), before)
    parscale.load_streams(model, saved[2], name="narrow")
    assert torch.equal(logits(model, ids), logits(widened(2), ids))
    parscale.use_streams(model, "default")
    assert torch.equal(logits(model, ids), before)


def test_training_goes_to_the_streams_in_use(saved: dict[int, Path], ids: Tensor) -> None:
    model = widened(4)
    parscale.load_streams(model, saved[2], name="narrow")
    trained = {name: p for name, p in model.named_parameters() if "prefix" in name}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = logits(model, ids)
    assert not torch.equal(after, logits(widened(2), ids))
    parscale.use_streams(model, "default")
    assert torch.equal(logits(model, ids), logits(widened(4), ids))
    parscale.use_streams(model, "narrow")
    assert torch.equal(logits(model, ids), after)


def test_what_is_in_use_is_what_is_saved(saved: dict[int, Path], ids: Tensor, tmp_path: Path) -> None:
    model = build()
    for p, folder in saved.items():
        parscale.load_streams(model, folder, name=f"p{p}")
    parscale.use_streams(model, "p2")
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(logits(loaded, ids), logits(widened(2), ids))
    parscale.save_streams(model, tmp_path / "again")
    assert (tmp_path / "again" / "streams.safetensors").read_bytes() == (saved[2] / "streams.safetensors").read_bytes()


def test_a_full_checkpoint_becomes_an_adapter(ids: Tensor, tmp_path: Path) -> None:
    """As the released checkpoints with a frozen base are: streams and base in one folder, loaded and taken apart."""
    widened(2).save_pretrained(tmp_path / "full")
    parscale.save_streams(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), tmp_path / "streams")
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(parscale.load_streams(base, tmp_path / "streams"), ids), logits(widened(2), ids))


def test_a_second_width_of_an_adapter(saved: dict[int, Path], ids: Tensor) -> None:
    """Requests for different adapters in one process: one model object each, one base."""
    model = build()
    parscale.load_streams(model, saved[2], name="p2")
    parscale.load_streams(model, saved[4], name="p4")
    other = model.with_streams(2)
    parscale.use_streams(other, "p2")
    assert torch.equal(logits(model, ids), logits(widened(4), ids))
    assert torch.equal(logits(other, ids), logits(widened(2), ids))


def test_generated_prefixes_are_saved_as_plain_ones(ids: Tensor, tmp_path: Path) -> None:
    model = with_streams(build(), prefix_init="reparameterized")
    with torch.no_grad():
        model.base_model.prefix_generator.vectors.normal_()
    parscale.save_streams(model, tmp_path)
    loaded = parscale.load_streams(build(), tmp_path)
    assert loaded.base_model.prefix_generator is None
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3"])
def test_other_families(family: str, ids: Tensor, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "deepseek_v3": {
            "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8,
        },
    }  # fmt: skip
    made = with_streams(build(family, **settings[family]))
    parscale.save_streams(made, tmp_path)
    loaded = parscale.load_streams(build(family, **settings[family]), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(made, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_another_precision_is_still_itself(
    dtype: torch.dtype, saved: dict[int, Path], tmp_path: Path
) -> None:
    loaded: Any = parscale.load_streams(build().to(dtype), saved[2])
    assert loaded.base_model.aggregate_layer[0].weight.dtype == dtype
    parscale.save_streams(loaded, tmp_path)
    assert parscale.load_streams(build(), tmp_path).dtype == torch.float32


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_streams_keep_their_precision_over_another_base(base: torch.dtype, saved: dict[int, Path], ids: Tensor) -> None:
    """As training over a base at rest has them: float32, of which nothing is lost by waiting."""
    model = widened(4).to(base)
    parscale.load_streams(model, saved[2], name="narrow")
    parscale.use_streams(model, "default")
    streams = stream_tensors(model)
    with torch.no_grad():
        for parameter in streams.values():
            parameter.data = parameter.data.float()
            parameter += 1e-4 * torch.randn_like(parameter)
    before, values = logits(model, ids), {name: p.clone() for name, p in streams.items()}
    for name in ("narrow", None, "default"):
        parscale.use_streams(model, name)
        assert model.dtype == base
    now = stream_tensors(model)
    assert all(now[name] is streams[name] and torch.equal(now[name], value) for name, value in values.items())
    assert torch.equal(logits(model, ids), before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for the old name
def test_a_lora_of_peft_has_to_be_taken_off(saved: dict[int, Path], ids: Tensor, tmp_path: Path) -> None:
    """It renames the modules that it wraps: nothing is written then, and the model stays what it was."""
    peft = pytest.importorskip("peft")
    model = widened(4)
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    before = logits(wrapped, ids)
    for refused in (
        lambda: parscale.save_streams(model, tmp_path / "none"),
        lambda: parscale.load_streams(model, saved[2], name="narrow"),
        lambda: parscale.use_streams(model, None),
        lambda: parscale.use_streams(model, "default"),
    ):
        with pytest.raises(InputError, match=r"has a LoRA of peft on it.*take the LoRA off.*unload\(\)"):
            refused()
    assert not (tmp_path / "none").exists()
    assert torch.equal(logits(wrapped, ids), before)
    base = wrapped.unload()
    parscale.save_streams(base, tmp_path)
    assert torch.equal(logits(parscale.load_streams(build(), tmp_path), ids), logits(widened(4), ids))
    parscale.load_streams(base, saved[2], name="narrow")
    parscale.use_streams(base, "default")
    assert torch.equal(logits(base, ids), logits(widened(4), ids))


def _another_seed() -> Any:
    model = build()
    model.model.layers[1].mlp.up_proj.weight.data.normal_()
    return model


def _finetuned() -> Any:
    """A step as small as fine-tuning makes, in every weight of one matrix."""
    model = build()
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.01)
    return model


@pytest.mark.parametrize(
    "make",
    [
        _another_seed,
        _finetuned,
        lambda: build(vocab_size=98),
        lambda: build("llama"),
        lambda: build(num_hidden_layers=3),
    ],
    ids=["other weights", "fine-tuned", "other vocabulary", "other family", "other depth"],
)
def test_the_wrong_base_is_refused_and_both_are_named(make: Any, saved: dict[int, Path], ids: Tensor) -> None:
    model = make()
    model.config._name_or_path = model.name_or_path = "someone/other"
    before, kind = logits(model, ids), type(model)
    right = base_identity(build())["values"]["bfloat16"][:12]
    with pytest.raises(InputError, match=rf"'unnamed' \(qwen2, weights {right}\).*'someone/other'") as refused:
        parscale.load_streams(model, saved[2])
    assert "\n" not in str(refused.value)
    assert type(model) is kind
    assert torch.equal(logits(model, ids), before)


def test_streams_do_not_count_as_the_base() -> None:
    assert base_identity(build()) == base_identity(widened(4))


@pytest.fixture
def broken(saved: dict[int, Path], tmp_path: Path) -> Path:
    for file in saved[4].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "streams.safetensors")
    edit(tensors)
    save_file(tensors, folder / "streams.safetensors")


PREFIX = "model.layers.0.self_attn.prefix_k"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(PREFIX), rf"lacks {PREFIX}"),
        (lambda t: t.update({"model.stream_other": torch.zeros(2)}), r"unexpected model\.stream_other"),
        (lambda t: t.update({PREFIX: torch.zeros(4, 2, 7, 8)}), rf"{PREFIX} \(4, 2, 7, 8\) instead of \(4, 2, 5, 8\)"),
    ],
    ids=["missing", "extra", "misshaped"],
)
def test_wrong_tensors_are_named(edit: Any, words: str, broken: Path, ids: Tensor) -> None:
    change(broken, edit)
    model = build()
    before = logits(model, ids)
    with pytest.raises(InputError, match=words):
        parscale.load_streams(model, broken)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert torch.equal(logits(model, ids), before)


def _cut(folder: Path) -> None:
    file = folder / "streams.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garble(folder: Path) -> None:
    (folder / "streams.safetensors").write_bytes(b"\xff" * 64)


def _edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "streams.json").read_text())
    (folder / "streams.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, r"streams\.safetensors: corrupt or cut short"),
        (_garble, r"streams\.safetensors: corrupt or cut short"),
        (lambda f: (f / "streams.safetensors").unlink(), r"has no streams\.safetensors"),
        (lambda f: (f / "streams.json").unlink(), r"has no streams\.json"),
        (lambda f: (f / "streams.json").write_text("{"), r"streams\.json: not what save_streams writes"),
        (lambda f: (f / "streams.json").write_text("[]"), r"streams\.json: not what save_streams writes"),
        (lambda f: _edit_manifest(f, base={"name": "x"}), r"streams\.json: not what save_streams writes"),
        (lambda f: _edit_manifest(f, config={"parscale_n": "many"}), r"streams='many' is not accepted"),
        (lambda f: _edit_manifest(f, config={"parscale_n": 2}), r"is not accepted"),
    ],
    ids=["cut", "garbled", "no tensors", "no manifest", "no JSON", "a list", "no identity", "bad P", "no settings"],
)
def test_damage_is_told_in_one_line(damage: Any, words: str, broken: Path) -> None:
    damage(broken)
    with pytest.raises(InputError, match=words) as refused:
        parscale.load_streams(build(), broken)
    assert "\n" not in str(refused.value)


def test_a_refused_set_changes_nothing(saved: dict[int, Path], broken: Path, ids: Tensor) -> None:
    """Neither a plain model nor one with streams is half changed."""
    tensors = load_file(broken / "streams.safetensors")
    save_file({name: tensor.int() for name, tensor in tensors.items()}, broken / "streams.safetensors")
    plain, kind = build(), type(build())
    expected = logits(plain, ids)
    with pytest.raises(InputError, match="is no floating point tensor"):
        parscale.load_streams(plain, broken)
    assert type(plain) is kind
    assert torch.equal(logits(plain, ids), expected)

    model = parscale.load_streams(build(), saved[8], "vectors")
    parscale.load_streams(model, saved[2], "prefixes")
    parscale.use_streams(model, "vectors")
    expected = logits(model, ids)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="cannot carry the streams' prefix"):
        parscale.use_streams(model, "prefixes")
    model.config._attn_implementation = "sdpa"
    assert model.streams == 8
    assert torch.equal(logits(model, ids), expected)


def test_adapters_of_a_base_that_is_no_model(saved: dict[int, Path], tmp_path: Path) -> None:
    for base in (str(tmp_path), 7):
        shutil.copytree(saved[2], tmp_path, dirs_exist_ok=True)
        manifest = json.loads((tmp_path / "streams.json").read_text())
        manifest["base"]["name"] = base
        (tmp_path / "streams.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="is not a model"):
            load_model(tmp_path)


def test_what_cannot_be_saved_or_used() -> None:
    for model in (build(), with_streams(build(), streams=1, prefix_tokens=0)):
        with pytest.raises(InputError, match="no streams to save"):
            parscale.save_streams(model, "nowhere")
        with pytest.raises(InputError, match=r"name='p4' is not among .*\[\]"):
            parscale.use_streams(model, "p4")
    assert not Path("nowhere").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parscale.save_streams(widened(2), tmp_path)
    before = (tmp_path / "streams.safetensors").read_bytes()

    def fail(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("parscale.streams.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        parscale.save_streams(widened(4), tmp_path)
    assert (tmp_path / "streams.safetensors").read_bytes() == before
    parscale.load_streams(build(), tmp_path)


def test_a_copy_of_a_model_has_its_own_adapters(saved: dict[int, Path], ids: Tensor) -> None:
    model = build()
    parscale.load_streams(model, saved[2], name="p2")
    parscale.load_streams(model, saved[8], name="p8")
    twin = copy.deepcopy(model)
    parscale.use_streams(twin, "p2")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "prefix" in name:
                parameter.zero_()
    parscale.use_streams(model, "p2")
    assert torch.equal(logits(model, ids), logits(widened(2), ids))


def test_the_control_is_an_adapter_too(ids: Tensor, tmp_path: Path) -> None:
    control = parscale.parallelize(build(), StreamsConfig(streams=1, prefix_tokens=4))
    parscale.save_streams(control, tmp_path)
    assert torch.equal(logits(parscale.load_streams(build(), tmp_path), ids), logits(control, ids))
