"""How streams start: never with what was left in memory, apart from each other, and as `prefix_init` promises."""

import copy
import inspect
import pickle
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import parscale
from parscale import StreamsConfig
from parscale.streams.families import register_family
from tests.contract.families import FAMILIES, VOCABULARY

P, N = 3, 5
ADDED = ("prefix_k", "prefix_v", "stream_embedding", "aggregate_layer")
INITS = ("normal", "near_identity", "reparameterized")
DTYPES = (torch.float32, torch.bfloat16)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return next(f for f in FAMILIES if f.name == "llama").build(dtype=dtype)


def settings(**changes: Any) -> StreamsConfig:
    return StreamsConfig(**{"streams": P, "prefix_tokens": N, "diversify": ("prefix", "embedding")} | changes)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """`torch.empty` gives NaN: what is not initialised shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_finite_and_apart(model: Any, ids: Tensor) -> None:
    added = {name: p for name, p in model.named_parameters() if any(part in name for part in ADDED)}
    assert len(added) == 2 * 2 + 1 + 4
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(ids).logits.isfinite().all()
    hidden = model.base_model(ids, output_hidden_states=True).hidden_states[-1].unflatten(0, (P, -1))
    assert all((hidden[i] - hidden[j]).abs().max() > 0 for i in range(P) for j in range(i))
    for name, parameter in added.items():
        if "prefix_k" in name or "stream_embedding" in name:
            assert len(parameter.flatten(1).unique(dim=0)) == P, name


@torch.no_grad()
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_init", INITS)
def test_parallelize_never_gives_nan(prefix_init: Any, dtype: torch.dtype, ids: Tensor) -> None:
    model = parscale.parallelize(llama(dtype), settings(prefix_init=prefix_init))
    assert all(p.dtype == dtype for p in model.parameters())
    assert_finite_and_apart(model, ids)


@torch.no_grad()
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_class_made_from_its_config_never_gives_nan(dtype: torch.dtype, ids: Tensor) -> None:
    config_class, model_class = register_family("llama")
    entries = llama().config.to_dict() | settings().to_json()
    entries.pop("model_type")
    assert_finite_and_apart(model_class(config_class(**entries)).eval(), ids)
    assert_finite_and_apart(AutoModelForCausalLM.from_config(config_class(**entries), dtype=dtype).eval(), ids)


@torch.no_grad()
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_weights_given_streams_by_keyword_never_give_nan(dtype: torch.dtype, ids: Tensor, tmp_path: Path) -> None:
    """What a checkpoint lacks is made on the meta device first: `torch.empty` again, after all constructors."""
    plain = llama(dtype)
    plain.save_pretrained(tmp_path)
    _, model_class = register_family("llama")
    keywords = settings().to_json()
    model = model_class.from_pretrained(tmp_path, dtype=dtype, **keywords).eval()
    assert_finite_and_apart(model, ids)
    assert model.config.model_type == "llama_parscale"  # else the next save would be read as a plain model
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())
    model.save_pretrained(tmp_path / "streams")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streams", dtype=dtype)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("start", ["normal", "orthogonal"])
def test_a_start_is_spread_as_the_layers_own_keys_and_values(start: Any, scale: float) -> None:
    """Per head and channel, as recorded here by an attention function of the test's own. Keys are after RoPE."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = key, value
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recording-test", record)
    AttentionMaskInterface.register("recording-test", sdpa_mask)
    calibration = torch.randint(VOCABULARY, (8, 32))
    model = llama()
    model.set_attn_implementation("recording-test")
    model(calibration)
    n = 2000
    wanted = settings(prefix_tokens=n, prefix_init=start, prefix_scale=scale)
    made: Any = parscale.parallelize(llama(), wanted, calibration=calibration)
    for layer, (key, value) in seen.items():
        attention = made.model.layers[layer].self_attn
        for bank, own in ((attention.prefix_k, key), (attention.prefix_v, value)):
            own = own.transpose(0, 1).flatten(1, 2)  # (Hk, B·T, D)
            mean, std = own.mean(1), scale * own.std(1)
            error = 5 * std / n**0.5  # five standard errors of the bank's own mean
            for stream in bank:
                assert ((stream.mean(1) - mean).abs() < error).all()
                assert ((stream.std(1) - std).abs() < error).all()


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Bytes of a page or two of English and Python, below 128."""
    source = inspect.getsource(textwrap)
    return torch.tensor(list(source.encode())).clamp(max=127)


@pytest.fixture(scope="module")
def trained(text: Tensor) -> Any:
    """A llama that has learnt a little, so that its queries have directions of their own and its loss can get worse."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        batch = blocks(text, 8)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def blocks(text: Tensor, rows: int, length: int = 64) -> Tensor:
    return torch.stack([text[i : i + length] for i in torch.randint(len(text) - length, (rows,)).tolist()])


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False], ids=["text", "default"])
@pytest.mark.parametrize("streams", [1, 4])
def test_near_identity_is_the_models_own_loss(trained: Any, text: Tensor, given: bool, streams: int) -> None:
    """Within a thousandth of a nat on the calibration batch; on short unseen text, where the first tokens see little
    but the prefix, within some thousandths."""
    model = copy.deepcopy(trained)
    held, calibration = blocks(text, 32), blocks(text, 16)
    assert trained(held, labels=held).loss < 2.8  # 4.85 before training
    config = StreamsConfig(streams=streams, prefix_init="near_identity")
    parscale.parallelize(model, config, calibration=calibration if given else None)
    assert max(costs(model, trained, held)) < 5e-3
    if given:
        divergence, _ = costs(model, trained, calibration)
        assert divergence < 1e-3
    model.set_attn_implementation("eager")
    prefix_share = torch.stack(model(held, output_attentions=True).attentions)[..., :48].sum(-1)
    assert (prefix_share.mean((1, 2, 3)) > 1e-4).all()  # of every layer: what draws nothing learns nothing


@torch.no_grad()
def test_near_identity_on_a_pretrained_model(shared: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(shared / "data/models/stories260K").eval()
    held = plain.generate(torch.ones(16, 1, dtype=torch.long), do_sample=True, max_new_tokens=127, min_new_tokens=127)
    model = parscale.parallelize(copy.deepcopy(plain), StreamsConfig(streams=4, prefix_init="near_identity"))
    assert max(costs(model, plain, held)) < 1e-3


def costs(model: Any, plain: Any, ids: Tensor) -> tuple[float, float]:
    """The streams' divergence from the plain model's predictions, and the loss they add, in nats a token."""
    expected, found = (m(ids, labels=ids) for m in (plain, model))
    wanted = expected.logits.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found.logits.log_softmax(-1))).sum(-1).mean()
    return divergence.item(), (found.loss - expected.loss).item()


def reparameterized() -> Any:
    model: Any = parscale.parallelize(llama(), settings(prefix_init="reparameterized"))
    return model.train()


def step(model: Any, ids: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_generator_trains(ids: Tensor) -> None:
    model = reparameterized()
    before = model(ids).logits.detach()
    model(ids, labels=ids).loss.backward()
    generator: nn.Module = model.base_model.prefix_generator
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs() > 0).float().mean() > 0.9, name
    assert all((row.abs() > 0).any() for row in generator.vectors.grad)  # type: ignore[union-attr]
    assert all(p.grad is None for name, p in model.named_parameters() if name.endswith(("prefix_k", "prefix_v")))
    torch.optim.SGD(generator.parameters(), lr=0.1).step()
    assert (model(ids).logits - before).abs().max() > 1e-3


@torch.no_grad()
def test_generator_starts_spread_as_the_layers_own(ids: Tensor) -> None:
    normal: Any = parscale.parallelize(llama(), settings(prefix_tokens=64))
    made: Any = parscale.parallelize(llama(), settings(prefix_tokens=64, prefix_init="reparameterized"))
    for one, other in zip(normal.model.layers, made.model.layers, strict=True):
        for name in ("prefix_k", "prefix_v"):
            own, generated = getattr(one.self_attn, name), getattr(other.self_attn, name)
            torch.testing.assert_close(generated.std((0, 2)), own.std((0, 2)), rtol=0.4, atol=0)


@pytest.mark.parametrize("streams", [P, 2])
def test_folding_changes_nothing(ids: Tensor, streams: int) -> None:
    model = reparameterized()
    step(model, ids)
    model.eval().set_streams(streams)
    with torch.no_grad():
        expected = model(ids).logits
        model.base_model.fold_prefix_generator()
        assert torch.equal(model(ids).logits, expected)
    assert not any("prefix_generator" in name for name, _ in model.named_parameters())
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.prefix_k.grad[:streams].abs().sum() > 0


def test_saving_folds_the_generator_away(ids: Tensor, tmp_path: Path) -> None:
    model = reparameterized()
    step(model, ids)
    model.eval().save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert model.base_model.prefix_generator is not None  # training goes on
    step(model, ids)


def test_copies_after_a_training_step(ids: Tensor) -> None:
    model = reparameterized()
    step(model, ids)
    model(ids)  # leaves tensors of a graph behind
    with torch.no_grad():
        expected = model(ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_generator_under_gradient_checkpointing(ids: Tensor, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = reparameterized()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.base_model.prefix_generator.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
