"""The ways in which streams went wrong inside transformers, each with the test that fails without its fix."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from parscale import StreamsConfig, load_streams, parallelize, save_streams
from parscale.streams import families
from parscale.streams.aggregate import AggregationHead
from parscale.streams.attention import attend
from parscale.streams.diversify.prefix import modules_with_prefix
from tests.contract.conftest import B, Case, N, P, T, make_case, parallelized
from tests.contract.families import COMMON, VOCABULARY
from tests.contract.reference import truth
from tests.contract.test_training import auxiliary_loss

PADS, ROWS = 4, P * B


def qwen2() -> Case:
    return make_case("qwen2", "sdpa")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T))


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """`torch.empty` gives NaN: what is not initialised shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def left_padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The batch with padding in front of its first row, and its mask."""
    padded = torch.cat([torch.zeros(B, PADS, dtype=torch.long), ids], dim=1)
    padded[1, :PADS] = ids[1, :PADS]
    mask = torch.ones_like(padded)
    mask[0, :PADS] = 0
    return padded, mask


def check_left_padded(model: Any, ids: Tensor) -> None:
    padded, mask = left_padded(ids)
    logits = model(padded, attention_mask=mask).logits
    truth(qwen2().plain, model, ids[:1]).close(logits[:1, PADS:])
    truth(qwen2().plain, model, padded[1:]).close(logits[1:])


@torch.no_grad()
def test_01_no_mask_must_not_cut_the_keys(ids: Tensor) -> None:
    """Given None and more keys than queries, sdpa's wrapper keeps the first T keys: the last n tokens would vanish."""
    seen: list[Any] = []
    attention = qwen2().model.model.layers[0].self_attn
    with attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True):
        logits = qwen2().model(ids, use_cache=False).logits
    assert seen[0]["attention_mask"] is None  # else this proves nothing
    truth(qwen2().plain, qwen2().model, ids).close(logits)


@torch.no_grad()
def test_02_a_swapped_class_must_still_record_its_outputs(ids: Tensor) -> None:
    """The registry of what a model can record is keyed by class."""
    model = make_case("mixtral", "eager").model
    output = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    for name, count in (("hidden_states", 3), ("attentions", 2), ("router_logits", 2 * P)):
        assert output[name] is not None, name
        assert len(output[name]) == count, name


@torch.no_grad()
@pytest.mark.usefixtures("nan_memory")
def test_03_no_prefix_is_ever_uninitialised_memory() -> None:
    """Neither in a model made from its config, nor in one whose checkpoint lacks them."""
    config_class, model_class = families.register_family("llama")
    model: Any = model_class(config_class(**COMMON, **StreamsConfig(P, N).to_json()))
    assert torch.empty(3).isnan().all()
    added = modules_with_prefix(model)
    assert len(added) == 2
    assert all(p.isfinite().all() for p in model.parameters())
    for attention in added.values():
        attention.prefix_k.fill_(torch.nan)
        attention.prefix_v.fill_(torch.nan)
        model.base_model._init_weights(attention)  # transformers' own hook for what is missing
        assert attention.prefix_k.isfinite().all()
        assert attention.prefix_v.isfinite().all()
        assert attention.prefix_k.std() > 0


@torch.no_grad()
def test_04_another_attention_must_not_drop_the_prefix(ids: Tensor) -> None:
    model, expected = qwen2().build(), truth(qwen2().plain, qwen2().model, ids)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        expected.close(model(ids).logits)


@torch.no_grad()
def test_05_caches_hold_the_rows_of_all_streams(ids: Tensor) -> None:
    """Static caches are made, or kept from fewer streams, for a number of rows; beams are moved stream by stream."""
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    model = qwen2().build()
    for streams in (1, P):
        model.set_streams(streams)
        expected = model.generate(ids, **options)
        for chunk in (None, 4):  # in chunks, newer transformers make the cache before they have seen a row
            found = model.generate(ids, cache_implementation="static", prefill_chunk_size=chunk, **options)
            assert torch.equal(found, expected)
    one, found = (qwen2().model.generate(ids, num_beams=4, use_cache=cached, **options) for cached in (False, True))
    assert torch.equal(one, found)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "mask"])
def test_06_the_experts_balance_counts_each_layer_and_stream(ids: Tensor, padded: bool) -> None:
    """The loss reads every entry of `router_logits` as the B·T tokens of one layer."""
    case = make_case("mixtral", "sdpa")
    inputs = {"attention_mask": torch.ones_like(ids)} if padded else {}
    output = case.model(ids, labels=ids, output_router_logits=True, **inputs)
    expected = truth(case.plain, case.model, ids, output_router_logits=True)
    assert [len(entry) for entry in output.router_logits] == [B * T] * len(expected.router_logits)
    balance = auxiliary_loss(torch.cat(expected.router_logits))
    torch.testing.assert_close(output.aux_loss.double(), balance, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
def test_07_flex_hides_padding_and_shows_the_prefix(ids: Tensor) -> None:
    """The columns of a BlockMask begin n before the real tokens: unshifted, padding would hide the wrong ones."""
    with torch.compiler.set_stance("force_eager"):
        check_left_padded(make_case("qwen2", "flex_attention").model, ids)


def test_08_plain_weights_under_a_class_with_streams_take_its_model_type(tmp_path: Path) -> None:
    """Left as the base's, the next load would make a plain model and drop every stream."""
    make_case("llama", "sdpa").plain.save_pretrained(tmp_path)
    _, model_class = families.register_family("llama")
    model: Any = model_class.from_pretrained(tmp_path, **StreamsConfig(P, N).to_json())
    assert model.config.model_type == "llama_parscale"
    assert model.config.to_dict()["model_type"] == "llama_parscale"


@torch.no_grad()
def test_09_swapped_classes_are_found_by_pickle(ids: Tensor) -> None:
    for swapped in (qwen2().model, qwen2().model.base_model, qwen2().model.config):
        assert getattr(families, type(swapped).__name__) is type(swapped)
        assert type(swapped).__module__ == families.__name__
    model = qwen2().build()  # of its own: transformers 5.17 cannot pickle one that has shown hidden states
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids).logits, qwen2().model(ids).logits)


@torch.no_grad()
def test_10_the_head_reads_hidden_major_stream_minor(ids: Tensor) -> None:
    """Input i·P + p of the first Linear is channel i of stream p, and real tokens keep positions 0 … T−1."""
    head = AggregationHead(P, 2)
    head[0].weight.zero_()
    head[0].weight[0, 0 * P + 2] = 1.0  # channel 0 of stream 2
    head[2].weight[0, 0] = 1.0
    hidden = torch.zeros(P, 1, 1, 2)
    for stream in range(P):
        for channel in range(2):
            hidden.zero_()[stream, 0, 0, channel] = 1.0
            assert (head(hidden).abs().max() > 0) == ((stream, channel) == (2, 0))
    positions: list[Tensor] = []
    attention = qwen2().model.model
    with attention.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    ):
        qwen2().model(ids)
    assert all(row.tolist() == list(range(T)) for row in positions[0])


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_11_positions_are_not_told_apart_by_their_first_size(batch: int) -> None:
    """(B, T) with B = 3 has the shape of multimodal positions for a batch of T."""
    ids = torch.randint(3, VOCABULARY, (batch, T))
    positions = torch.arange(T) + torch.tensor([[0], [5], [11]])[:batch]
    expected = truth(qwen2().plain, qwen2().model, ids, position_ids=positions)
    expected.close(qwen2().model(ids, position_ids=positions).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_12_a_paged_cache_never_holds_the_prefix(implementation: str) -> None:
    """Continuous batching hands the cache to the attention function, which writes what it is given."""
    attention = qwen2().model.model.layers[0].self_attn
    query, (key, value) = torch.randn(ROWS, 4, T, 8), torch.randn(2, ROWS, 2, T, 8)
    mask = torch.zeros(ROWS, 1, T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    cache = RecordingCache()
    options: dict[str, Any] = {"implementation": implementation, "scaling": 8**-0.5}
    found, _ = attend(attention, query, key, value, mask, cache=cache, **options)
    assert [length for length, _ in cache.written] == [T]
    assert torch.equal(cache.written[0][1], key)
    expected, _ = attend(attention, query, key, value, mask, **options)
    assert torch.equal(found, expected)


class RecordingCache:
    """A paged cache that holds one request: it gives back what it took."""

    def __init__(self) -> None:
        self.written: list[tuple[int, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        self.written.append((key_states.shape[2], key_states.clone()))
        return key_states, value_states


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_13_a_padded_batch_takes_its_positions_from_the_mask(ids: Tensor, backend: str) -> None:
    """RoPE is relative and forgives an offset; the prefix stands still, and does not."""
    check_left_padded(make_case("qwen2", backend).model, ids)


def _gradients(model: Any, ids: Tensor, *, threaded: bool = False) -> Tensor:
    """Of a pass with two streams, after which the model is set to three. On a GPU autograd has a thread of its own."""
    model.zero_grad()
    model.set_streams(2)
    loss = model(ids, labels=ids).loss
    model.set_streams(3)
    if threaded:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kv": "shared", "diversify": ("prefix", "lora")}], ids=str)
def test_14_a_recomputing_backward_pass_runs_the_streams_of_its_forward_pass(
    ids: Tensor, settings: dict[str, Any], reentrant: bool, enabled: str
) -> None:
    expected = _gradients(qwen2().build(**settings).train(), ids)
    model = qwen2().family.build() if enabled == "before" else qwen2().build(**settings)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if enabled == "before":
        model = parallelized(model, **settings)
    model.train()
    for threaded in (False, True):
        torch.testing.assert_close(_gradients(model, ids, threaded=threaded), expected)


def test_15_models_of_one_config_object_keep_their_own(ids: Tensor, tmp_path: Path) -> None:
    plain = qwen2().plain
    config = copy.deepcopy(plain.config)
    one, other = type(plain)(config).eval(), type(plain)(config).eval()
    parallelize(one, StreamsConfig(streams=2, prefix_tokens=3))
    assert one.config is not config
    assert all(m.config is one.config for m in one.modules() if getattr(m, "config", None) is not None)
    assert (type(other.config), other.config.model_type) == (type(plain.config), "qwen2")
    before = other(ids).logits
    other.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, before)
    parallelize(other, StreamsConfig(streams=4))
    assert (one.streams, other.streams) == (2, 4)
    save_streams(one, tmp_path / "streams")
    third = type(plain)(config)
    third.load_state_dict(one.state_dict(), strict=False)
    load_streams(third, tmp_path / "streams")
    assert type(config) is type(plain.config)


@torch.no_grad()
def test_16_a_second_width_does_not_call_the_first_ones_compiled_code(ids: Tensor) -> None:
    model = qwen2().build()
    model._compiled_call, model._last_compile_config = model.__call__, None
    assert not {"_compiled_call", "_last_compile_config"} & vars(model.with_streams(1)).keys()


def test_17_pickle_finds_the_classes_in_a_new_process(tmp_path: Path) -> None:
    torch.save(qwen2().build(), tmp_path / "model.pt")
    code = f"import parscale, torch; print(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False).streams)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(P), done.stderr
