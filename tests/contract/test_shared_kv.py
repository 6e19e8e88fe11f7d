"""`kv="shared"` in every family: stream 0's keys and values for all streams, against separate passes that read them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from parscale import InputError, StreamsConfig, parallelize
from parscale.streams.kv import KEYS_AND_VALUES
from tests.contract.conftest import B, Case, P, T, unmapped
from tests.contract.reference import _AllInFloat64, truth
from tests.contract.test_generation import NEW, argmax_loop
from tests.small import build, with_streams

SETTINGS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix+lora": {"diversify": ("prefix", "lora")},
    "one prefix+lora": {"diversify": ("prefix", "lora"), "shared_prefix": True},
    "lora": {"diversify": ("lora",)},
    "plain first": {"diversify": ("prefix", "lora"), "plain_first": True},
    "all": {"diversify": ("prefix", "embedding", "lora", "rank1")},
}


@pytest.fixture(autouse=True)
def only_families_without_recurrent_layers(request: pytest.FixtureRequest) -> None:
    if "case" in request.fixturenames and request.getfixturevalue("case").family.recurrent:
        pytest.skip("refused: see test_recurrent_layers_are_refused")


def shared(case: Case, settings: str = "prefix+lora", **more: Any) -> Any:
    return case.build(kv="shared", **(SETTINGS[settings] | more))


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_passes_that_read_stream_0s_keys(case: Case, ids: Tensor, settings: str) -> None:
    model = shared(case, settings)
    for p in (3, 2, 1):
        model.set_streams(p)
        truth(case.plain, model, ids, streams=p).close(model(ids).logits)


@torch.no_grad()
def test_differs_from_own_keys(case: Case, ids: Tensor) -> None:
    """Else the passes above would prove nothing."""
    model, own = shared(case), case.build(diversify=("prefix", "lora"))
    own.load_state_dict({k: x.expand_as(own.state_dict()[k]) for k, x in model.state_dict().items()})
    expected = truth(case.plain, model, ids)
    assert (own(ids).logits - expected.logits).abs().max() > 100 * expected.tolerance


@pytest.mark.parametrize("settings", ["prefix+lora", "one prefix+lora", "plain first", "all"])
def test_gradient_is_that_of_the_loss(case: Case, ids: Tensor, settings: str) -> None:
    """Along a random direction of all parameters: the slope of the loss, whose value the passes above prove."""
    if case.backend == "flex_attention":
        pytest.skip("flex_attention has no float64 backward pass on a CPU")
    model = shared(case, settings).double()
    model.config._experts_implementation = "eager"  # grouped matrix products know no float64
    with _AllInFloat64():
        model(ids, labels=ids).loss.backward()
        slope, step = 0.0, 1e-5
        directions = [torch.randn_like(p) / p.numel() ** 0.5 for p in model.parameters()]
        for parameter, direction in zip(model.parameters(), directions, strict=True):
            slope += 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
        losses = []
        for sign in (1, -2):
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.data += sign * step * direction
            with torch.no_grad():
                losses.append(model(ids, labels=ids).loss.item())
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


@torch.no_grad()
def test_keys_and_values_are_projected_once(case: Case, ids: Tensor) -> None:
    model, rows = shared(case), []
    for module in model.modules():
        for leaf in set(KEYS_AND_VALUES) & dict(module.named_children()).keys():
            getattr(module, leaf).register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model(ids)
    assert set(rows) <= {B}


@torch.no_grad()
@pytest.mark.parametrize("settings", ["prefix+lora", "one prefix+lora", "lora"])
def test_cache_is_the_plain_models(case: Case, ids: Tensor, settings: str) -> None:
    """Filled in chunks by any p, for the next tokens at any other: it holds stream 0 alone."""
    model, caches = shared(case, settings), []
    cache = DynamicCache(config=model.config)
    for part, p in zip(ids.split((4, 3, 1, 1), dim=1), (3, 1, 3, 2), strict=True):
        model.set_streams(p)
        logits = model(part, past_key_values=cache).logits
        end = cache.get_seq_length()
        truth(case.plain, model, ids, streams=p).close(logits, (slice(None), slice(end - part.shape[1], end)))
    caches = [cache, DynamicCache(config=case.plain.config)]
    case.plain(ids, past_key_values=caches[1])
    sizes = [[(layer.keys.shape, layer.values.shape) for layer in one.layers] for one in caches]
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_plain_first_without_prefix_has_the_plain_models_keys_and_values(case: Case, ids: Tensor) -> None:
    """One cache for the model with and without its streams."""
    model, caches = shared(case, "lora", plain_first=True), []
    for one in (model, case.plain):
        caches.append(DynamicCache(config=one.config))
        one(ids, past_key_values=caches[-1])
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    after = ids[:, :1]
    together, alone = model(after, past_key_values=caches[1]), model(after, past_key_values=caches[0])
    torch.testing.assert_close(together.logits, alone.logits)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("settings", ["prefix+lora", "one prefix+lora", "lora", "plain first", "all"])
def test_prompt_needs_stream_0_alone(case: Case, ids: Tensor, settings: str, keep: int, padded: bool) -> None:
    """Where the last logits are asked for, as `generate` does, the other streams run over the last tokens alone: behind
    stream 0's prompt if they can, in a pass of their own otherwise."""
    model, rows = shared(case, settings), []
    mask = torch.ones_like(ids)
    mask[0, : 3 * padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "stream_state"):
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs: rows.append((args or tuple(kwargs.values()))[0].shape[:2].numel()),
                with_kwargs=True,
            )
            break
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=keep)
    hook.remove()
    assert sum(rows) in {B * (T + P - 1), B * (T - keep) + P * B * keep}
    assert max(rows) < P * B * T
    torch.testing.assert_close(found.logits, expected[:, -keep:], rtol=0, atol=1e-5)
    assert found.past_key_values.get_seq_length() == T
    assert model.streams == P
    assert model.base_model.stream_state.run is model.base_model.stream_state.default
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    at = (longer.cumsum(-1) - 1).clamp(min=0)
    cached: Any = {"attention_mask": longer, "past_key_values": found.past_key_values, "position_ids": at[:, -1:]}
    after = model(ids[:, :1], **cached)
    again = model(torch.cat([ids, ids[:, :1]], dim=1), attention_mask=longer, position_ids=at)
    torch.testing.assert_close(after.logits, again.logits[:, -1:], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}, {"streams": 2}],
    ids=["greedy", "beams", "chunks", "static", "two streams"],
)
def test_generates_as_uncached(case: Case, ids: Tensor, options: dict[str, Any]) -> None:
    if case.backend == "flex_attention" and "cache_implementation" in options:
        pytest.skip("transformers has no static cache with prepared block masks")
    model, mask = shared(case), torch.ones_like(ids)
    settings: dict[str, Any] = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": mask,
    }
    found = model.generate(ids, **settings, **options)
    if "num_beams" in options:
        assert torch.equal(found, model.generate(ids, use_cache=False, **settings, **options))
        return
    model.set_streams(options.get("streams", P))
    assert torch.equal(found, argmax_loop(model, ids))


@torch.no_grad()
def test_left_padded_rows_generate_as_alone(case: Case, ids: Tensor) -> None:
    model = shared(case)
    padded, mask = torch.cat([torch.zeros(B, 3, dtype=torch.long), ids], dim=1), torch.ones(B, T + 3, dtype=torch.long)
    mask[:, :3] = 0
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **settings)[:, T + 3 :], argmax_loop(model, ids)[:, T:]
    )


def test_checkpoint_round_trip(case: Case, ids: Tensor, tmp_path: Any) -> None:
    model = shared(case, "one prefix+lora")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again.set_attn_implementation(case.backend)
    assert again.base_model.stream_state.config == model.base_model.stream_state.config
    with torch.no_grad():
        assert torch.equal(unmapped(again)(ids).logits, model(ids).logits)


def test_layers_with_attention_and_a_recurrent_state_are_refused() -> None:
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    with pytest.raises(InputError, match="beside attention its layers keep a recurrent state"):
        parallelize(build("falcon_h1", **state), StreamsConfig(2, kv="shared"))


@torch.no_grad()
@pytest.mark.parametrize("diversify", [("prefix", "lora"), ("rank1",)])
def test_a_prompt_through_a_mixture_that_flattens_its_rows(ids: Tensor, diversify: tuple[Any, ...]) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    plain = build("qwen2_moe", **experts, shared_expert_intermediate_size=16)
    model = with_streams(plain, kv="shared", diversify=diversify)
    expected = model(ids).logits[:, -1]
    found = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_prompt_while_prefixes_are_made_by_a_generator(ids: Tensor) -> None:
    model = with_streams(build(), kv="shared", diversify=("prefix", "lora"), prefix_init="reparameterized")
    for parameter in model.base_model.prefix_generator.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    expected = model(ids).logits[:, -1]
    found = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(found, expected)


def test_recurrent_layers_are_refused(trained_case: Case) -> None:
    if not trained_case.family.recurrent:
        pytest.skip("all its layers attend")
    plain = trained_case.family.build()
    before = type(plain), plain.state_dict().keys()
    with pytest.raises(InputError, match=r"only 1 of its \d+ layers attend .* use kv='own'"):
        parallelize(plain, StreamsConfig(2, kv="shared"))
    assert before == (type(plain), plain.state_dict().keys())
