"""Continuous batching over a paged cache (`generate_batch`): each request's tokens are those it gets alone."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from parscale import InputError
from parscale.streams import attention
from parscale.streams.paged import OLDEST
from tests.small import NEW, build, uncached, with_streams

pytestmark = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST,
    reason="an older transformers: refused, see test_dynamic.py",
)
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
LENGTHS = (9, 2, 7, 16, 5, 1)


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in LENGTHS]


def paged(**settings: Any) -> ContinuousBatchingConfig:
    """A small cache: by default transformers would take most of the machine's memory."""
    return ContinuousBatchingConfig(**{"num_blocks": 64, "max_batch_tokens": 64, "page_size": 4} | settings)


def run(model: Any, prompts: list[list[int]], settings: ContinuousBatchingConfig | None = None, **options: Any) -> Any:
    results = model.generate_batch(
        prompts, generation_config=GREEDY, continuous_batching_config=settings or paged(), progress_bar=False, **options
    )
    assert [result.error for result in results.values()] == [None] * len(prompts)
    return [result.generated_tokens for result in results.values()]


def alone(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [uncached(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_requests_answer_as_alone(prompts: list[list[int]], streams: int, backend: str) -> None:
    model = with_streams(build())
    model.set_attn_implementation(backend)
    narrow = model.with_streams(streams)
    assert run(model, prompts, streams=streams) == alone(narrow, prompts)
    assert model.streams == 4
    assert model.config._attn_implementation == f"parscale|{backend}"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 4},
        {"num_blocks": 16, "max_batch_tokens": 8},
        {"page_size": 32, "num_blocks": 8},
    ],
    ids=["prompts in chunks", "requests wait for blocks", "large pages"],
)
def test_whatever_the_scheduler_does(model: Any, prompts: list[list[int]], settings: dict[str, int]) -> None:
    assert run(model, prompts, paged(**settings)) == alone(model, prompts)


def test_requests_do_not_meet_each_others_keys(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where the pairs that a mask discards cost what the others do. In small batches a call costs more."""
    monkeypatch.setattr(attention, "PAIRS", 1)
    attend, keys = attention._attend, []

    def seen(module: Any, run: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        if "cache" not in options:  # of the whole packed batch
            keys.append(key.shape[2])
        return attend(module, run, query, key, *args, **options)

    monkeypatch.setattr(attention, "_attend", seen)
    assert run(model, prompts) == alone(model, prompts)
    assert len(keys) >= len(prompts) * (NEW - 1)
    assert max(keys) == max(LENGTHS) + NEW - 1


def test_a_shared_beginning_is_computed_once(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks found by their tokens hold all streams' keys and values."""
    search, found = PagedAttentionCache.search_prefix_match, []
    monkeypatch.setattr(
        PagedAttentionCache, "search_prefix_match", lambda *args: found.append(search(*args)) or found[-1]
    )
    same = [prompts[3], prompts[3] + prompts[0], prompts[3]]
    settings = paged(max_batch_tokens=16, max_requests_per_batch=1)
    assert run(model, same, settings) == alone(model, same)
    assert found[0] == 0
    assert min(found[1:]) >= 8


ALL = {"diversify": ("prefix", "embedding", "lora", "rank1")}
WITH_LORA = {"kv": "shared", "diversify": ("prefix", "lora")}


@pytest.mark.parametrize(
    "streams",
    [
        ALL,
        ALL | {"kv": "shared"},
        WITH_LORA | {"shared_prefix": True},
        WITH_LORA | {"plain_first": True, "prefix_tokens": 0},
        {"streams": 1},
    ],
)
@pytest.mark.parametrize("pairs", [1, attention.PAIRS])
def test_other_streams(
    prompts: list[list[int]], streams: dict[str, Any], pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "PAIRS", pairs)  # request by request, or all of them in one call
    model = with_streams(build(), **streams)
    assert run(model, prompts) == alone(model, prompts)


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 8}], ids=["whole", "in chunks"])
def test_with_shared_keys_the_first_stream_reads_the_prompts(
    prompts: list[list[int]], settings: dict[str, int]
) -> None:
    """The others run over what something is predicted from: one token of a request in a step."""
    model, rows = with_streams(build(), **WITH_LORA), []
    with model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2].numel())):
        found = run(model, prompts, paged(**settings))
    assert found == alone(model, prompts)
    read = sum(LENGTHS) + 3 * len(LENGTHS)  # a chunk in the middle of a prompt has one more, which nobody reads
    written = 4 * (NEW - 1) * len(LENGTHS)
    assert read + written <= sum(rows) <= read + written + (3 * 4 * len(LENGTHS) if settings else 0)


def test_streams_without_a_prefix(prompts: list[list[int]]) -> None:
    model = with_streams(build(), prefix_tokens=0, diversify=("embedding",))
    assert run(model, prompts) == alone(model, prompts)
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match=r"eager.*set_attn_implementation\('sdpa'\)"):
        run(model, prompts)


def test_a_model_without_streams_is_left_to_transformers(prompts: list[list[int]]) -> None:
    model = with_streams(build(), streams=1, prefix_tokens=0)
    assert run(model, prompts) == alone(model, prompts)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen3_moe", {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("streams", [{}, WITH_LORA], ids=["own", "shared"])
def test_other_families(
    prompts: list[list[int]], family: str, settings: dict[str, Any], streams: dict[str, Any]
) -> None:
    model = with_streams(build(family, **settings), **streams)
    assert run(model, prompts) == alone(model, prompts)


def test_layers_that_a_paged_cache_cannot_hold_are_refused(prompts: list[list[int]]) -> None:
    model = with_streams(
        build(
            "qwen3_next", num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
            linear_value_head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            shared_expert_intermediate_size=24,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match=r"Qwen3Next.*use generate\(\)"):
        run(model, prompts)


def test_managers_of_two_widths_at_once(model: Any, prompts: list[list[int]]) -> None:
    """One process, one set of weights, requests at P = 4 and at P = 1 in the same moment."""
    narrow = model.with_streams(1)
    options = {"generation_config": GREEDY, "continuous_batching_config": paged()}
    with (
        model.continuous_batching_context_manager(**options) as wide_manager,
        narrow.continuous_batching_context_manager(**options) as narrow_manager,
    ):
        found: dict[str, list[list[int]]] = {}
        for manager in (wide_manager, narrow_manager):
            manager.add_requests(prompts, max_new_tokens=NEW)
        for name, manager in (("wide", wide_manager), ("narrow", narrow_manager)):
            results = {}
            while len(results) < len(prompts):
                result = manager.get_result(timeout=60)
                assert result is not None
                assert result.error is None
                if result.is_finished():
                    results[tuple(result.prompt_ids)] = result.generated_tokens
            found[name] = [results[tuple(prompt)] for prompt in prompts]
    assert found == {"wide": alone(model, prompts), "narrow": alone(narrow, prompts)}


def test_set_streams_does_not_reach_a_running_manager(prompts: list[list[int]]) -> None:
    model = with_streams(build())
    expected = alone(model, prompts)
    manager = model.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=paged())
    model.set_streams(2)
    manager.start()
    try:
        manager.add_requests(prompts[:1], max_new_tokens=NEW)
        result = manager.get_result(timeout=60)
        while not result.is_finished():
            result = manager.get_result(timeout=60)
    finally:
        manager.stop(block=True)
    assert result.generated_tokens == expected[0]


def test_a_manager_that_is_kept_keeps_its_p(prompts: list[list[int]]) -> None:
    model = with_streams(build())
    run(model, prompts, persistent_manager=True)
    assert run(model, prompts, persistent_manager=True) == alone(model, prompts)
    with pytest.raises(InputError, match=r"streams=2.*runs 4.*destroy_cached_continuous_batching_manager"):
        run(model, prompts, streams=2, persistent_manager=True)
    assert model.with_streams(2).streams == 2
    model.destroy_cached_continuous_batching_manager()
    assert run(model, prompts, streams=2) == alone(model.with_streams(2), prompts)


def test_the_cache_holds_the_heads_of_all_streams_or_of_one_and_no_prefix(model: Any, ids: Tensor) -> None:
    manager = model.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=paged())
    manager.warmup()
    cache = manager.batch_processor.cache
    allocator = cache.layer_to_allocator[0]
    assert allocator.num_key_value_heads == model.cached_streams * model.config.num_key_value_heads
    assert allocator.head_dim == 8
    assert cache.num_blocks == 64  # of four tokens each: none reserved for the prefix's five
