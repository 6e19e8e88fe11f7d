"""`parallelize` refuses what cannot work, by name and reason, and leaves the refused model as it was."""

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel

import parscale
from parscale import InputError, StreamsConfig
from tests.contract.families import COMMON, FAMILIES, VOCABULARY


@pytest.fixture
def unchecked() -> Iterator[None]:
    """A user's mistake meets the library itself, not the tests' shape checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


IDS = torch.arange(3, 12)[None]


def causal(model_type: str, drop: tuple[str, ...] = (), **settings: Any) -> PreTrainedModel:
    common = {name: value for name, value in COMMON.items() if name not in drop}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(common | settings))).eval()


def other(model_class: str, model_type: str, **settings: Any) -> PreTrainedModel:
    import transformers

    return getattr(transformers, model_class)(AutoConfig.for_model(model_type, **(COMMON | settings))).eval()


def llama() -> Any:
    return next(f for f in FAMILIES if f.name == "llama").build()


BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
GPTJ = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 128}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bloom": (lambda: causal("bloom", n_layer=1, n_head=4), "BloomForCausalLM.*AttentionInterface.*llama"),
    "gptj": (lambda: causal("gptj", **GPTJ), "GPTJForCausalLM.*AttentionInterface.*llama"),
    "falcon": (lambda: causal("falcon", drop=("head_dim",)), "FalconForCausalLM.*AttentionInterface.*llama"),
    "opt": (lambda: causal("opt", ffn_dim=48, word_embed_proj_dim=32), "OPTForCausalLM.*backbone.*llama"),
    "bart-decoder": (lambda: causal("bart", **BART), "BartForCausalLM.*backbone.*llama"),
    "bart": (lambda: other("BartForConditionalGeneration", "bart", **BART), "BartFor.*encoder-decoder.*decoder-only"),
    "t5": (lambda: other("T5ForConditionalGeneration", "t5", **T5), "T5For.*encoder-decoder.*decoder-only"),
    "bert": (lambda: causal("bert"), "Bert.*looks ahead.*decoder"),
    "masked": (lambda: other("BertForMaskedLM", "bert"), "BertForMaskedLM.*causal.*AutoModelForCausalLM"),
    "backbone": (lambda: other("LlamaModel", "llama"), "LlamaModel.*causal.*AutoModelForCausalLM"),
    "classifier": (lambda: other("LlamaForSequenceClassification", "llama"), "LlamaForSeq.*AutoModelForCausalLM"),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_left_alone(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(InputError, match=message) as caught:
            parscale.parallelize(model, StreamsConfig(streams=2))
        assert "\n" not in str(caught.value)
    assert_same(snapshot(model), before)


GEMMA3N = {
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2,
    "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [48, 48],
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
GEMMA4 = {
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "global_head_dim": 8, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gemma3n_text", GEMMA3N, r"Gemma3nForCausalLM.*predicts something else"),
        ("gemma4_text", GEMMA4, r"Gemma4ForCausalLM.*from `inputs_embeds`"),
    ],
)
def test_a_vector_where_token_ids_are_read_in_every_layer(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    """One family would leave out what it reads there, the other raises in every forward pass."""
    model = causal(model_type, **settings)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)  # some start at zero, and would hide what is left out
    before = snapshot(model)
    with pytest.raises(InputError, match=reason) as caught:
        parscale.parallelize(model, StreamsConfig(streams=2, diversify=("embedding",)))
    assert "\n" not in str(caught.value)
    assert "use 'prefix' or 'lora'" in str(caught.value)
    assert_same(snapshot(model), before)
    parscale.parallelize(model, StreamsConfig(streams=2))


@torch.no_grad()
def test_more_streams_than_right_angles() -> None:
    """A head of 8 channels, and 2 prefix tokens: 16 directions."""
    model = llama()
    before = snapshot(model)
    config = {"prefix_tokens": 2, "prefix_init": "orthogonal"}
    with pytest.raises(InputError, match=r"'orthogonal' with streams=17 and prefix_tokens=2.*only 16.*more tokens"):
        parscale.parallelize(model, StreamsConfig(streams=17, **config))  # type: ignore[arg-type]
    assert_same(snapshot(model), before)
    parscale.parallelize(model, StreamsConfig(streams=16, **config))  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (8,), (2, 3, 4)])
@pytest.mark.usefixtures("unchecked")
def test_calibration_of_another_shape(shape: tuple[int, ...]) -> None:
    """One token has no spread: the prefixes would be NaN."""
    model = llama()
    before = snapshot(model)
    with pytest.raises(InputError, match=r"calibration of shape \(.*\(B, T\), at least two"):
        parscale.parallelize(model, calibration=torch.ones(shape, dtype=torch.long))
    assert_same(snapshot(model), before)
    parscale.parallelize(model, calibration=torch.tensor([[5, 6]]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_twice() -> None:
    model = parscale.parallelize(llama(), StreamsConfig(streams=2, prefix_tokens=5))
    before = snapshot(model)
    with pytest.raises(InputError, match=r"LlamaParScaleForCausalLM has streams already.*set_streams"):
        parscale.parallelize(model, StreamsConfig(streams=3))
    assert_same(snapshot(model), before)


@torch.no_grad()
def test_twice_even_if_the_first_gave_nothing() -> None:
    model = parscale.parallelize(llama(), StreamsConfig(streams=1, prefix_tokens=0))
    with pytest.raises(InputError, match="has streams already"):
        parscale.parallelize(model)


@pytest.mark.parametrize("wrapped", [nn.Linear(2, 2), nn.Sequential(llama()), "llama", None])
@pytest.mark.usefixtures("unchecked")
def test_not_a_transformers_model(wrapped: Any) -> None:
    """peft, DDP and compile wrap a model in a module of their own."""
    with pytest.raises(InputError, match=f"{type(wrapped).__name__} is not a transformers model.*before wrapping"):
        parscale.parallelize(wrapped)


@pytest.mark.usefixtures("unchecked")
def test_wrapped_as_peft_does() -> None:
    """A wrapper that passes attribute look-ups on looks like the model inside."""

    class PeftModelForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = llama()

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base"), name)

    with pytest.raises(InputError, match=r"PeftModelForCausalLM is not a transformers model.*peft"):
        parscale.parallelize(PeftModelForCausalLM())  # type: ignore[arg-type]


def test_meta_device() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*meta device.*load its weights"):
        parscale.parallelize(model)
    assert type(model).__name__ == "LlamaForCausalLM"


@torch.no_grad()
def test_attention_implementation_of_ones_own() -> None:
    AttentionInterface.register("own", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    model = llama()
    model.set_attn_implementation("own")
    before = snapshot(model)
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*'own'.*prefix.*sdpa"):
        parscale.parallelize(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("streams", [0, 5, True, "2", 1.0, None])
@pytest.mark.usefixtures("unchecked")
def test_set_streams_beyond_what_was_trained(streams: Any) -> None:
    model: Any = parscale.parallelize(llama(), StreamsConfig(streams=4, prefix_tokens=5))
    with pytest.raises(InputError, match=r"streams=.*this model has 4, give 1 to 4"):
        model.set_streams(streams)
    assert model.streams == 4


def test_unknown_key_in_a_file() -> None:
    config = AutoConfig.for_model("llama_parscale", **COMMON, parscale_n=2, parscale={"prefixes": 3})
    with pytest.raises(InputError, match=r"unknown keys \['prefixes'\]"):
        AutoModelForCausalLM.from_config(config)


def test_unknown_family() -> None:
    with pytest.raises(InputError, match=r"model_type='clip'.*no causal language model"):
        parscale.register_family("clip")
    with pytest.raises(InputError, match="model_type='no-such-model'"):
        parscale.register_family("no-such-model")


@torch.no_grad()
def test_what_it_touches() -> None:
    """The docstring's list, and nothing else: the base's parameters are the same objects under the same names."""
    model = llama()
    before = dict(model.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    assert parscale.parallelize(model, StreamsConfig(streams=2, prefix_tokens=5)) is model
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())
    added = {name.split(".")[-1] if "prefix" in name else name for name in after.keys() - before.keys()}
    head = {f"model.aggregate_layer.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert added == {"prefix_k", "prefix_v"} | head
    assert isinstance(model, AutoModelForCausalLM._model_mapping[LlamaConfig])
    assert isinstance(model.base_model, LlamaModel)
    assert isinstance(model.config, LlamaConfig)


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_state_of_the_model_stay(training: bool) -> None:
    model = llama().train(training)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags = [p.requires_grad for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    parscale.parallelize(model, StreamsConfig(streams=2, prefix_tokens=5, prefix_init="near_identity"))
    assert model.training == training
    assert all(m.training == training for m in model.modules())
    assert [dict(model.named_parameters())[name].requires_grad for name in names] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_seed_gives_the_same_streams() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        model = parscale.parallelize(llama(), StreamsConfig(streams=2, diversify=("prefix", "embedding")))
        made.append(model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@torch.no_grad()
def test_another_instance_of_the_family_stays_plain() -> None:
    parscale.parallelize(llama(), StreamsConfig(streams=2))
    plain = llama()
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not any("prefix" in name for name, _ in plain.named_parameters())
    assert plain(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, VOCABULARY)


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    inputs: dict[str, Tensor] = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    return {
        "class": type(model),
        "config class": type(model.config),
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "parameters": list(model.state_dict()),
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "output": model(**inputs)[0],
    }


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert torch.equal(after.pop("output"), before.pop("output"))
    assert after == before
