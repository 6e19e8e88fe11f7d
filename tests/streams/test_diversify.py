"""What tells streams apart: where the parameters lie, how they start, which models can carry them, what is kept."""

import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import parscale
from parscale import InputError, StreamsConfig, load_streams, save_streams, use_streams
from parscale.config import DIVERSIFIERS
from parscale.load import load_model
from parscale.streams.diversify import lora, projections, protocol, rank1
from parscale.streams.families import register_family
from tests.contract.conftest import P, parallelized
from tests.contract.families import COMMON, FAMILIES, VOCABULARY
from tests.contract.reference import UPDATES, with_weights_of_stream


def family(name: str) -> Any:
    return next(f for f in FAMILIES if f.name == name).build()


def build(name: str, *diversify: str, **settings: Any) -> Any:
    """A tiny model whose streams are far from their start."""
    return parallelized(family(name), diversify=diversify, **settings)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9))


# Where they lie


QKV = {f"self_attn.{x}_proj" for x in "qkv"}
SWIGLU = {"mlp.gate_proj", "mlp.up_proj"}
SHARED = {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2", QKV | SWIGLU),
        ("gemma3", QKV | SWIGLU),
        ("phi3", {"self_attn.qkv_proj", "mlp.gate_up_proj"}),
        ("gpt2", {"attn.c_attn", "mlp.c_fc"}),
        ("gpt_neox", {"attention.query_key_value", "mlp.dense_h_to_4h"}),
        ("mixtral", QKV),
        ("gpt_oss", QKV),
        (
            "deepseek_v3",
            {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}
            | SWIGLU
            | {"mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"},
        ),
        ("qwen3_next", QKV | SHARED | {"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"}),
    ],
)
def test_all_that_reads_the_hidden_state_and_nothing_else(name: str, expected: set[str]) -> None:
    """No router, no expert, no projection back into the hidden state, though in the tiny models some are as wide."""
    found = projections.find(family(name))
    assert {key.split(".", 2)[2] for key in found} == expected
    assert {key.split(".")[1] for key in found} == {str(i) for i in range(4 if name == "qwen3_next" else 2)}


class Block(nn.Module):
    """Experts and a router as some families have them: modules of their own, that see the tokens sent to them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(32, 8)}) for _ in range(4))


def test_experts_and_routers_of_modules_are_left_alone() -> None:
    model = family("qwen2")
    model.model.layers[0].mlp = Block()
    assert {key for key in projections.find(model) if "layers.0" in key} == {f"layers.0.{name}" for name in QKV}


def test_parameters_lie_beside_the_weights() -> None:
    model = build("qwen2", "lora", "rank1", lora_rank=3)
    projection = model.model.layers[1].mlp.up_proj
    assert {name: tuple(p.shape) for name, p in projection.named_parameters()} == {
        "weight": (48, 32),
        "stream_lora_a": (P, 32, 3),
        "stream_lora_b": (P, 3, 48),
        "stream_scale_in": (P, 32),
        "stream_scale_out": (P, 48),
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_targets": ("q_proj", "wq")}, r"lora_targets wq: Qwen2.*it has q_proj, k_proj, v_proj, gate_proj, up_"),
        ({"lora_targets": ("k_proj", "v_proj"), "kv": "shared"}, r"k_proj, v_proj with kv='shared': only the first"),
    ],
)
def test_targets_that_no_stream_can_have_are_refused(settings: dict[str, Any], said: str) -> None:
    model = family("qwen2")
    with pytest.raises(InputError, match=said):
        parscale.parallelize(model, StreamsConfig(P, diversify=("prefix", "lora"), **settings))
    assert type(model).__name__ == "Qwen2ForCausalLM"


@torch.no_grad()
def test_targets_are_saved_with_the_model(ids: Tensor, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora_targets": ["up_proj", "q_proj"], "kv": "shared", "plain_first": True}
    model = build("qwen2", "prefix", "lora", **settings)
    with_update = {name for name, module in model.named_modules() if hasattr(module, "stream_lora_a")}
    assert {name.rpartition(".")[2] for name in with_update} == {"up_proj", "q_proj"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["parscale"]["lora_targets"] == ["up_proj", "q_proj"]
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, model(ids).logits)


def test_no_projection_is_refused_before_anything_changes() -> None:
    config = AutoConfig.for_model("qwen2", **(COMMON | {"num_hidden_layers": 0}))
    for diversify in ("lora", "rank1"):
        model: Any = AutoModelForCausalLM.from_config(config)
        before = dict(vars(model.config))
        with pytest.raises(InputError, match=r"Qwen2ForCausalLM.*32 features.*'lora' and 'rank1'"):
            parscale.parallelize(model, StreamsConfig(P, diversify=(diversify,)))  # type: ignore[arg-type]
        assert type(model).__name__ == "Qwen2ForCausalLM"
        assert dict(vars(model.config)) == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj"])
def test_models_that_cannot_carry_a_prefix(name: str, ids: Tensor) -> None:
    """Their attention does not go through transformers' interface; their projections are as good as any."""
    settings = COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    del settings["head_dim"]
    config = AutoConfig.for_model(name, **settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model = parallelized(copy.deepcopy(plain), diversify=("lora", "rank1"), aggregate="mean")
    passes = [with_weights_of_stream(plain, model, i).base_model(ids).last_hidden_state for i in range(P)]
    assert (passes[0] - passes[1]).abs().mean() > 1e-3
    torch.testing.assert_close(model(ids).logits, plain.get_output_embeddings()(sum(passes) / P))
    with pytest.raises(InputError, match="AttentionInterface"):
        parscale.parallelize(plain, StreamsConfig(P, diversify=("prefix", "lora")))


class Int8Linear(nn.Module):
    """A quantised linear module as libraries make them: no parameters, weights of integers."""

    scale: Tensor
    integers: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.register_buffer("integers", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.integers.to(x.dtype) * self.scale.to(x.dtype))


@torch.no_grad()
def test_quantised_projections(ids: Tensor) -> None:
    plain = family("llama").to(torch.bfloat16)
    for layer in plain.model.layers:
        layer.self_attn.k_proj = Int8Linear(layer.self_attn.k_proj)
    model = parallelized(copy.deepcopy(plain), diversify=("lora", "rank1"))
    module = model.model.layers[0].self_attn.k_proj
    assert module.stream_lora_a.dtype == module.stream_scale_in.dtype == torch.bfloat16
    x = torch.randn(P * 2, 5, 32, dtype=torch.bfloat16)
    weight = (module.integers * module.scale).double().T
    for i, (rows, made) in enumerate(zip(x.chunk(P), module(x).chunk(P))):
        a, b = module.stream_lora_a[i].double(), module.stream_lora_b[i].double()
        scale_in, scale_out = module.stream_scale_in[i].double(), module.stream_scale_out[i].double()
        torch.testing.assert_close(
            made.double(), (rows.double() * scale_in) @ (weight + a @ b) * scale_out, rtol=0.05, atol=0.05
        )
    assert model(ids).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for the old name
def test_rank1_and_lora_of_peft_on_top(ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = build("llama", "lora", "rank1")
    expected = model(ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    assert torch.equal(wrapped(ids).logits, expected)  # peft starts with zeros too
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_()
    assert not torch.allclose(wrapped(ids).logits, expected)
    wrapped(ids).logits.sum().backward()
    assert all((p.grad is not None) == ("lora_A" in key or "lora_B" in key) for key, p in wrapped.named_parameters())


# What they compute


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "tokens"])
def test_update_is_each_streams_own_product(flat: bool) -> None:
    x = torch.randn(P * 2, 5, 7, dtype=torch.float64)
    a, b = torch.randn(P, 7, 3, dtype=torch.float64), torch.randn(P, 3, 11, dtype=torch.float64)
    output = torch.randn(P * 2, 5, 11, dtype=torch.float64)
    expected = output + torch.cat([rows @ a[i] @ b[i] for i, rows in enumerate(x.chunk(P))])
    if flat:  # as mixtures of experts see rows and tokens
        x, output, expected = x.flatten(0, 1), output.flatten(0, 1), expected.flatten(0, 1)
    torch.testing.assert_close(lora.add_update(output, x, a, b), expected)


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "tokens"])
def test_scales_are_each_streams_own(flat: bool) -> None:
    x, scales = torch.randn(P * 2, 5, 7, dtype=torch.float64), torch.randn(P, 7, dtype=torch.float64)
    expected = torch.cat([rows * scales[i] for i, rows in enumerate(x.chunk(P))])
    given = x.flatten(0, 1) if flat else x
    assert torch.equal(rank1.scale(given, scales), expected.flatten(0, 1) if flat else expected)


@torch.no_grad()
def test_operations_of_the_update_grow_with_the_rank_alone(ids: Tensor) -> None:
    """2·r·(in + out) a token and projection, as docs/diversifiers.md says: no weight per stream is ever made."""

    def operations(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model(ids)
        return counter.get_total_flops()

    without = operations(build("qwen2", "embedding"))
    widths = [32 + 32, 32 + 16, 32 + 16, 32 + 48, 32 + 48]
    for rank in (1, 4):
        added = operations(build("qwen2", "embedding", "lora", lora_rank=rank)) - without
        assert added == P * ids.numel() * 2 * sum(2 * rank * width for width in widths)
    assert operations(build("qwen2", "embedding", "rank1")) == without


# How they start


@torch.no_grad()
def test_lora_starts_at_the_plain_model(ids: Tensor) -> None:
    plain, model = family("qwen2"), family("qwen2")
    parscale.parallelize(model, StreamsConfig(P, diversify=("lora",)))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    a = model.model.layers[0].mlp.up_proj.stream_lora_a
    assert 0.8 < a.std() * 32**0.5 < 1.2
    assert (a[0] - a[1]).abs().mean() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("diversify", [("rank1",), ("embedding", "lora", "rank1")], ids="+".join)
def test_near_identity(ids: Tensor, diversify: tuple[Any, ...]) -> None:
    plain, model = family("qwen2"), family("qwen2")
    parscale.parallelize(model, StreamsConfig(P, diversify=diversify, prefix_init="near_identity"))
    expected, found = (m(ids).logits.log_softmax(-1) for m in (plain, model))
    assert 0 < (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3
    scales: Any = model.model.layers[0].mlp.up_proj.stream_scale_in
    assert (scales[0] != scales[1]).all()
    assert 0 < (scales - 1).abs().max() < 0.1


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
def test_from_config(meta: bool) -> None:
    config_class, model_class = register_family("qwen2")
    given = StreamsConfig(P, prefix_tokens=5, diversify=DIVERSIFIERS, lora_rank=3)
    with torch.device("meta" if meta else "cpu"):
        model: Any = model_class(config_class(**COMMON, **given.to_json()))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in build("qwen2", *DIVERSIFIERS, lora_rank=3).named_parameters()
    }
    projection = model.model.layers[0].mlp.up_proj
    if meta:
        assert projection.stream_lora_a.is_meta
        return
    assert all(p.isfinite().all() for p in model.parameters())
    assert (projection.stream_lora_b == 0).all()
    assert projection.stream_lora_a.std() > 0
    assert 0.05 < (projection.stream_scale_in - 1).std() < 0.2


def test_missing_tensors_are_started_or_refused(tmp_path: Path) -> None:
    """transformers' own hook starts them, so that nothing uninitialised is ever seen; our loading refuses them."""
    model = build("qwen2", *DIVERSIFIERS)
    module = model.model.layers[0].mlp.up_proj
    for name in UPDATES:
        getattr(module, name).data.fill_(torch.nan)
    model.model._init_weights(module)
    assert (module.stream_lora_b == 0).all()
    assert all(getattr(module, name).isfinite().all() for name in UPDATES)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("1.mlp.up_proj.stream_scale_in")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.stream_scale_in"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# What is kept and taken away


@torch.no_grad()
@pytest.mark.parametrize("diversify", [("lora",), ("rank1", "embedding"), DIVERSIFIERS], ids="+".join)
def test_adapters(ids: Tensor, tmp_path: Path, diversify: tuple[str, ...]) -> None:
    model, base = build("qwen2", *diversify), family("qwen2")
    plain, expected = base(ids).logits, model(ids).logits
    save_streams(model, tmp_path)
    load_streams(base, tmp_path)
    assert torch.equal(base(ids).logits, expected)
    use_streams(base, None)
    assert torch.equal(base(ids).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    use_streams(base, "default")
    assert torch.equal(base(ids).logits, expected)


def test_attach_and_detach() -> None:
    model = build("qwen2", *DIVERSIFIERS)
    expected = set(family("qwen2").state_dict())
    for diversifier in protocol.ALL.values():
        for _ in range(2):
            diversifier.detach(model)
    assert {name for name in model.state_dict() if "aggregate_layer" not in name} == expected


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("diversify", [("lora",), DIVERSIFIERS], ids="+".join)
def test_continuous_batching_at_fewer_streams(ids: Tensor, diversify: tuple[str, ...]) -> None:
    model = build("qwen2", *diversify)
    prompts = [ids[0].tolist(), ids[1, :5].tolist()]
    done = model.generate_batch(prompts, max_new_tokens=4, do_sample=False, streams=2, progress_bar=False)
    model.set_streams(2)
    made = [output.generated_tokens for output in sorted(done.values(), key=lambda one: len(one.prompt_ids))]
    for prompt, tokens in zip(sorted(prompts, key=len), made):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        assert tokens == alone[0, len(prompt) :].tolist()


# What may be asked for


@pytest.mark.parametrize(
    ("streams", "tokens", "diversify"),
    [
        *product((1, 4), (0, 48), [("lora",), ("rank1", "lora"), ("lora", "embedding")]),
        (1, 48, ("prefix", "lora")),
        (1, 0, ("prefix",)),
    ],
)
def test_config_is_written_and_read(streams: int, tokens: int, diversify: tuple[Any, ...]) -> None:
    config = StreamsConfig(streams, tokens, diversify=diversify, lora_rank=2)
    assert StreamsConfig.from_json(config.to_json()) == config


def test_what_a_config_has() -> None:
    assert StreamsConfig(4, 0, diversify=("prefix", "lora")).diversifiers == ("lora",)
    assert StreamsConfig(1, 48, diversify=("prefix", "embedding")).diversifiers == ("prefix",)
    assert not StreamsConfig(1, 0, diversify=("lora",)).is_plain
    assert StreamsConfig(1, 48, diversify=("embedding",)).is_plain
    assert [d.__name__.rsplit(".", 1)[1] for d in protocol.chosen(StreamsConfig(2, diversify=("rank1", "prefix")))] == [  # type: ignore[attr-defined]
        "prefix",
        "rank1",
    ]
    assert tuple(protocol.ALL) == DIVERSIFIERS


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8"])
def test_impossible_ranks_are_refused(rank: Any) -> None:
    with pytest.raises(InputError, match="lora_rank"):
        StreamsConfig(lora_rank=rank)


@pytest.mark.parametrize("targets", [(3,), ("q_proj", "q_proj"), None])
def test_impossible_targets_are_refused(targets: Any) -> None:
    with pytest.raises(InputError, match="lora_targets"):
        StreamsConfig(diversify=("lora",), lora_targets=targets)
    with pytest.raises(InputError, match="goes with 'lora'"):
        StreamsConfig(lora_targets=("q_proj",))


def test_streams_with_nothing_between_them_are_refused() -> None:
    with pytest.raises(InputError, match=r"nothing tells the streams apart.*'lora'"):
        StreamsConfig(4, prefix_tokens=0)
