"""An adapter of peft on a model with streams: what it computes beside the weights is what it merges into them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import VOCABULARY, build, greedy, uncached, with_streams

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks for the old name
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {},
    "AdaLoraConfig": {"total_step": 10, "init_r": 4, "target_r": 2},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 8},
    "DeftConfig": {},
    "DeloraConfig": {},
    "FourierFTConfig": {"n_frequency": 50},
    "FrodConfig": {},
    "GloraConfig": {},
    "GraloraConfig": {},
    "HRAConfig": {"r": 4},
    "HiraConfig": {},
    "IA3Config": {"feedforward_modules": ["up_proj"]},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "MissConfig": {"r": 8},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "OSFConfig": {},
    "PeanutConfig": {},
    "PsoftConfig": {"r": 4},
    "PveraConfig": {},
    "RandLoraConfig": {},
    "RoadConfig": {"group_size": 8},
    "ShiraConfig": {"r": 4},
    "SupertuningConfig": {},
    "TinyLoraConfig": {},
    "UniLoraConfig": {},
    "VBLoRAConfig": {"vector_length": 8, "num_vectors": 8},
    "VeraConfig": {},
    "WaveFTConfig": {"n_frequency": 50},
}
"""peft's methods that change weights, with what they need on a tiny model."""
OTHERS = {
    "AdaptionPromptConfig", "CPTConfig", "CartridgeConfig", "LilyConfig", "MultitaskPromptTuningConfig", "PolyConfig",
    "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "ShadowConfig", "XLoraConfig",
}  # fmt: skip
"""peft's methods that cannot be merged into any model."""
TRIED_APART = {"AdamssConfig", "BeftConfig", "TrainableTokensConfig"}
LORAS = ({"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"})
STREAMS = {
    "prefix and lora": {"diversify": ("prefix", "lora")},
    "prefix and rank1": {"diversify": ("prefix", "rank1")},
    "shared, all": {"kv": "shared", "diversify": ("prefix", "embedding", "lora", "rank1")},
    "shared, rank1": {"kv": "shared", "diversify": ("prefix", "rank1")},
    "plain first": {"kv": "shared", "diversify": ("lora",), "plain_first": True},
}
FAMILIES = {
    "gpt2": (
        {"num_key_value_heads": None, "head_dim": None, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_fc"]
    ),
    "phi3": ({}, ["qkv_proj", "gate_up_proj"]),
    "qwen2": ({}, TARGETS),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ["q_proj", "v_proj"]),
    "deepseek_v3": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
         "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4},
        ["q_a_proj", "kv_a_proj_with_mqa", "up_proj"],
    ),
}  # fmt: skip


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def streams_on(plain: Any, **streams: Any) -> Any:
    """Two streams whose every update differs from its neutral start."""
    model = with_streams(plain, **{"streams": 2} | streams)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "stream_scale" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def adapted(model: Any, method: str = "LoraConfig", **settings: Any) -> Any:
    """The model with an adapter that changes much."""
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | METHODS.get(method, {}) | settings
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, getattr(peft, method)(**options), autocast_adapter_dtype=False)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return wrapped.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def merges_to_the_same(model: Any, ids: Tensor, method: str = "LoraConfig", **settings: Any) -> None:
    """In float64: what is left is what a method itself computes in float32."""
    model.config._experts_implementation = "eager"  # grouped matrix products know no float64
    before = logits(model, ids)
    wrapped = adapted(model, method, **settings).double()
    beside = logits(wrapped, ids)
    assert (beside - before).abs().max() > 0.05
    torch.testing.assert_close(logits(wrapped.merge_and_unload(), ids), beside, rtol=0, atol=1e-4)


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "OFTConfig"])
def test_merged_is_beside(method: str, streams: str, ids: Tensor) -> None:
    merges_to_the_same(streams_on(build("llama"), **STREAMS[streams]), ids, method)


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_beside_in_every_method(method: str, streams: str, ids: Tensor) -> None:
    merges_to_the_same(streams_on(build("llama"), **STREAMS[streams]), ids, method)


def test_biases_and_tokens_merge_too(ids: Tensor) -> None:
    """BEFT needs projections with a bias, and tokens are no projections."""
    streams = {"diversify": ("prefix", "lora", "rank1")}
    merges_to_the_same(streams_on(build("qwen2"), **streams), ids, "BeftConfig", target_modules=["q_proj", "k_proj"])
    tokens = {"target_modules": ["embed_tokens"], "token_indices": ids[0].tolist()}
    model = streams_on(build("llama"), **streams)
    before = logits(model, ids)
    wrapped = peft.get_peft_model(model, peft.TrainableTokensConfig(**tokens)).eval()
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter)
    beside = logits(wrapped, ids)
    assert (beside - before).abs().max() > 0.05
    torch.testing.assert_close(logits(wrapped.merge_and_unload(), ids), beside, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_subspaces_merge_too(ids: Tensor) -> None:
    pytest.importorskip("sklearn")
    merges_to_the_same(streams_on(build("llama"), **STREAMS["prefix and rank1"]), ids, "AdamssConfig")


def test_every_method_of_peft_is_tried() -> None:
    configs = {config.__name__ for config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    assert configs == METHODS.keys() | OTHERS | TRIED_APART


@pytest.mark.parametrize("settings", LORAS, ids=str)
@pytest.mark.parametrize("streams", ["prefix and rank1", "shared, all"])
def test_merged_is_beside_in_every_kind_of_lora(streams: str, settings: dict[str, Any], ids: Tensor) -> None:
    merges_to_the_same(streams_on(build("llama"), **STREAMS[streams]), ids, **settings)


@pytest.mark.parametrize("diversify", [("lora",), ("rank1",), ("prefix", "lora", "rank1")], ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_beside_in_every_family(family: str, diversify: tuple[str, ...], ids: Tensor) -> None:
    settings, targets = FAMILIES[family]
    model = streams_on(build(family, **settings), diversify=diversify, streams=3)
    merges_to_the_same(model, ids, use_dora=True, target_modules=targets)


@pytest.mark.parametrize("streams", STREAMS)
def test_streams_start_from_the_adapted_weights(streams: str, ids: Tensor) -> None:
    """The truth: the same streams on a plain model into which the same adapter was merged before."""
    model = streams_on(build("llama"), **STREAMS[streams])
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    beside = logits(adapted(model, use_dora=True), ids)
    merged = streams_on(adapted(build("llama"), use_dora=True).merge_and_unload(), **STREAMS[streams])
    own = [name for name, _ in merged.named_parameters() if "stream_" in name or "prefix_" in name or "aggr" in name]
    assert own
    for name in own:
        merged.get_parameter(name).data = tensors[name]
    torch.testing.assert_close(beside, logits(merged, ids), rtol=0, atol=2e-5)


def test_an_adapter_starts_at_the_models_predictions(ids: Tensor) -> None:
    """PiSSA takes a part of the weights out of them, and computes it beside."""
    model = streams_on(build("llama"), diversify=("prefix", "rank1"))
    before = logits(model, ids)
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(wrapped, ids), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("streams", STREAMS)
def test_the_model_is_what_it_was_without_the_adapter(streams: str, ids: Tensor) -> None:
    model = streams_on(build("llama"), **STREAMS[streams])
    names, before = [name for name, _ in model.named_parameters()], logits(model, ids)
    wrapped = adapted(model)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, ids), before)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped.unload(), ids), before, rtol=0, atol=2e-5)
    assert [name for name, _ in model.named_parameters()] == names
    model.set_streams(1)
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("streams", STREAMS)
def test_all_that_runs_a_model_runs_it_with_an_adapter(streams: str, ids: Tensor) -> None:
    wrapped = adapted(streams_on(build("llama"), **STREAMS[streams]))
    expected = logits(wrapped, ids)
    assert torch.equal(greedy(wrapped, ids), uncached(wrapped, ids))
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(logits(twin, ids), expected)
        twin.get_base_model().set_streams(1)
        assert not torch.allclose(logits(twin, ids), expected, atol=1e-3)
    assert torch.equal(logits(wrapped, ids), expected)
    other = wrapped.get_base_model().with_streams(1)
    wrapped.get_base_model().set_streams(1)
    assert torch.equal(logits(other, ids), logits(wrapped, ids))


def test_two_adapters_on_one_model(ids: Tensor) -> None:
    wrapped = adapted(streams_on(build("llama"), diversify=("prefix", "lora", "rank1"))).double()
    first = logits(wrapped, ids)
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "gate_proj"], init_lora_weights=False))
    wrapped.double().set_adapter("second")
    second = logits(wrapped, ids)
    assert (first - second).abs().max() > 0.05
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped, ids), first)
    torch.testing.assert_close(
        logits(wrapped.merge_and_unload(adapter_names=["second"]), ids), second, atol=1e-8, rtol=0
    )


def test_streams_train_beside_an_adapter(ids: Tensor) -> None:
    """The gradient of the streams' updates is that of the same model with the adapter merged."""
    gradients = []
    for merge in (False, True):
        wrapped = adapted(streams_on(build("llama"), diversify=("prefix", "lora", "rank1")), use_dora=True).double()
        model = wrapped.merge_and_unload() if merge else wrapped
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("stream_" in name)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 0
    for beside, merged in zip(*gradients, strict=True):
        torch.testing.assert_close(beside, merged, rtol=1e-6, atol=1e-8)
