"""Threads, nested calls and interruptions on one model: each gets what it gets alone, and nothing is left wrong.

The yardstick is the same call alone, before and after. Threads meet at a barrier inside a layer, so that passes overlap
whatever the scheduler does.
"""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

from parscale import HardTokens, StreamsConfig, parallelize
from parscale.probe import probe_streams
from tests.contract.conftest import parallelized
from tests.contract.families import FAMILIES, VOCABULARY
from tests.ecosystem.grid import DIVERSIFIERS, cases
from tests.small import build, with_streams

P, T, NEW, THREADS = 3, 7, 3, 4
CASES = cases({("llama", "lora"), ("gemma2", "prefix"), ("gpt2", "rank1+embedding"), ("qwen3_moe", "lora")})
KVS = ["own", "shared"]


@remembered
def _model(name: str, kind: str, kv: str) -> Any:
    return parallelized(next(family for family in FAMILIES if family.name == name).build(), kv=kv, **DIVERSIFIERS[kind])


def _prompts(count: int) -> list[Tensor]:
    return [
        torch.randint(3, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed)) for seed in range(count)
    ]


def _generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    settings = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    return model.generate(ids, **settings | options)


@contextmanager
def _meeting(model: Any, threads: int, passes: int = 2) -> Iterator[None]:
    """While it lasts, each thread waits inside its first passes until all are there. A pass that ends early fails."""
    barrier, seen = threading.Barrier(threads, timeout=120), threading.local()

    def meet(*_: Any) -> None:
        seen.passes = getattr(seen, "passes", 0) + 1
        if seen.passes <= passes:
            barrier.wait()

    layers = getattr(model.base_model, "layers", None) or model.base_model.h
    hook = layers[0].register_forward_hook(meet)
    try:
        yield
    finally:
        hook.remove()


def _together(model: Any, jobs: list[Callable[[], Any]]) -> None:
    """Each job in a thread of its own gives what it gives alone, and the model is left as it was."""
    alone, state = [job() for job in jobs], model.base_model.stream_state
    before = state.default
    with _meeting(model, len(jobs)), ThreadPoolExecutor(len(jobs)) as pool:
        found = [future.result() for future in [pool.submit(job) for job in jobs]]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert state.run is state.default is before
    torch.testing.assert_close(jobs[0](), alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "kind", "kv"), CASES)
def test_threads_at_one_p(name: str, kind: str, kv: str) -> None:
    model = _model(name, kind, kv)
    _together(model, [lambda ids=ids: _generate(model, ids) for ids in _prompts(THREADS)])


@pytest.mark.parametrize(("name", "kind", "kv"), CASES)
def test_another_p_in_each_thread(name: str, kind: str, kv: str) -> None:
    model = _model(name, kind, kv)
    asked = [1, 2, [3, 1], None if kv == "own" or name in ("gemma2", "gemma3") else HardTokens(3.5, 3)]
    _together(model, [lambda i=i, p=p: _generate(model, i, streams=p) for i, p in zip(_prompts(4), asked, strict=True)])


@pytest.mark.parametrize("kv", KVS)
def test_ways_to_generate(kv: str) -> None:
    model = _model("llama", "lora", kv)
    draft = model.with_streams(1)
    ways: list[dict[str, Any]] = [
        {"num_beams": 3, "streams": 2},
        {"cache_implementation": "static", "streams": 3},
        {"prefill_chunk_size": 3},
        {"use_cache": False, "streams": 1},
    ]
    _together(model, [lambda i=i, w=w: _generate(model, i, **w) for i, w in zip(_prompts(4), ways, strict=True)])
    one_row = [ids[:1] for ids in _prompts(2)]
    # Their steps are not transformers' alone: no argument says how many tokens there are at least.
    ways = [{"assistant_model": draft, "streams": 2}, {"prompt_lookup_num_tokens": 2, "streams": 3}]
    _together(model, [lambda i=i, w=w: _generate(model, i, **w) for i, w in zip(one_row, ways, strict=True)])


@pytest.mark.parametrize("kv", KVS)
def test_continuous_batching_beside_generate(kv: str) -> None:
    model = _model("llama", "lora", kv)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)

    def batch(ids: Tensor, streams: int) -> Tensor:
        answers = model.generate_batch(
            ids.tolist(), settings, continuous_batching_config=paged, streams=streams, progress_bar=False
        )
        return torch.tensor([one.generated_tokens for one in answers.values()])

    first, second, third, _ = _prompts(4)
    jobs = [lambda: batch(first, 3), lambda: batch(second, 2), lambda: _generate(model, third, streams=2)]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        found = [future.result() for future in [pool.submit(job) for job in jobs]]
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert model.streams == P


@pytest.mark.parametrize("kv", KVS)
def test_asyncio(kv: str) -> None:
    """Tasks that generate in threads, each at its own p."""
    model = _model("llama", "lora", kv)
    asked = [(ids, p) for ids in _prompts(2) for p in (1, 2, 3)]
    alone = [_generate(model, ids, streams=p) for ids, p in asked]

    async def answers() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(_generate, model, ids, streams=p) for ids, p in asked))

    assert all(torch.equal(one, other) for one, other in zip(asyncio.run(answers()), alone, strict=True))
    assert model.streams == P


class _AfterEachToken(StoppingCriteria):
    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("kv", KVS)
def test_set_streams_does_not_reach_a_generate_in_another_thread(kv: str) -> None:
    model = parallelized(build("llama"), kv=kv, **DIVERSIFIERS["lora"])
    (ids,) = _prompts(1)
    alone = {p: _generate(model, ids, streams=p) for p in (1, P)}

    def elsewhere() -> None:
        thread = threading.Thread(target=model.set_streams, args=(1,))
        thread.start()
        thread.join()
        assert model.streams == P

    assert torch.equal(_generate(model, ids, stopping_criteria=[_AfterEachToken(elsewhere)]), alone[P])
    assert model.streams == 1
    assert torch.equal(_generate(model, ids), alone[1])


def test_set_streams_within_a_generate_holds_to_its_end() -> None:
    """p may change by the token where keys and values are shared."""
    model = _model("llama", "lora", "shared")
    (ids,) = _prompts(1)
    expected = _generate(model, ids, max_new_tokens=1, min_new_tokens=1)
    expected = _generate(model, expected, streams=2, max_new_tokens=NEW - 1, min_new_tokens=NEW - 1)
    found = _generate(model, ids, stopping_criteria=[_AfterEachToken(lambda: model.set_streams(2))])
    assert torch.equal(found, expected)
    assert model.streams == P


@pytest.mark.parametrize("place", ["after each token", "in the first layer", "in the last layer"])
@pytest.mark.parametrize("streams", [2, "hard"])
@pytest.mark.parametrize("kv", KVS)
def test_generate_within_generate(kv: str, streams: Any, place: str) -> None:
    """The inner one inherits the p of the outer, or has its own; neither sees the other's pass."""
    if streams == "hard" and kv == "own":
        pytest.skip("hard tokens need shared keys and values")
    model = _model("llama", "lora", kv)
    outer, inner = _prompts(2)
    asked: Any = HardTokens(3.0, 3) if streams == "hard" else streams
    alone = [_generate(model, outer, streams=asked)] + [_generate(model, inner, streams=p) for p in (asked, 3)]
    found: list[Tensor] = []
    busy = threading.local()

    def nested(*_: Any) -> None:
        if not getattr(busy, "now", False):
            busy.now = True
            found[:] = [_generate(model, inner), _generate(model, inner, streams=3)]
            busy.now = False

    if place == "after each token":
        made = _generate(model, outer, streams=asked, stopping_criteria=[_AfterEachToken(nested)])
    else:
        hook = model.base_model.layers[0 if "first" in place else -1].register_forward_hook(nested)
        made = _generate(model, outer, streams=asked)
        hook.remove()
    assert torch.equal(made, alone[0])
    assert torch.equal(found[0], alone[1])
    assert torch.equal(found[1], alone[2])
    assert model.streams == P


def test_the_backbone_within_a_prompt() -> None:
    """A hook that runs the backbone has a pass of its own, not the prompt's, with other streams' tokens behind it."""
    model, (outer, inner) = _model("llama", "lora", "shared"), _prompts(2)
    expected, alone, found = _generate(model, outer), model.base_model(inner).last_hidden_state, []
    busy = threading.local()

    def nested(*_: Any) -> None:
        if not getattr(busy, "now", False):
            busy.now = True
            found.append(model.base_model(inner).last_hidden_state)
            busy.now = False

    hook = model.base_model.layers[0].register_forward_hook(nested)
    made = _generate(model, outer)
    hook.remove()
    assert torch.equal(made, expected)
    assert len(found) == NEW
    for hidden in found:
        torch.testing.assert_close(hidden, alone)


def _interrupt_each_module(model: Any, job: Callable[[], Any]) -> Iterator[bool]:
    """Run the job again and again, with Ctrl-C in the n-th module that it calls; whether it came."""
    calls, at = 0, 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    hooks = [module.register_forward_hook(interrupt) for module in model.modules()]
    try:
        job()
        for at in range(1, calls + 1, max(1, calls // 20)):  # noqa: B007
            calls = 0
            try:
                job()
            except KeyboardInterrupt:
                calls = 10**6
            yield calls == 10**6
    finally:
        for hook in hooks:
            hook.remove()


def _interrupt_each_call(model: Any, job: Callable[[], Any]) -> Iterator[bool]:
    """The same at the n-th entry into a function of the library, where Python looks for signals too."""
    streams, calls, at = str(Path("parscale", "streams")), 0, 0

    def trace(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        if streams in frame.f_code.co_filename:
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

    def traced() -> None:
        nonlocal calls
        calls, before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            job()
        finally:
            sys.settrace(before)

    traced()
    total = calls
    for at in range(1, total + 1, max(1, total // 20)):  # noqa: B007
        try:
            traced()
        except KeyboardInterrupt:
            yield True
        else:
            yield False


@pytest.mark.parametrize("place", [_interrupt_each_module, _interrupt_each_call])
@pytest.mark.parametrize("job", ["generate", "hard tokens", "beams", "a prompt", "a look at the streams"])
@pytest.mark.parametrize("kv", KVS)
def test_ctrl_c_leaves_nothing_behind(kv: str, job: str, place: Callable[..., Iterator[bool]]) -> None:
    if job == "hard tokens" and kv == "own":
        pytest.skip("hard tokens need shared keys and values")
    model, (ids,) = _model("llama", "lora", kv), _prompts(1)
    jobs: dict[str, Callable[[], Any]] = {
        "generate": lambda: _generate(model, ids, streams=2),
        "hard tokens": lambda: _generate(model, ids, streams=HardTokens(3.0, 3)),
        "beams": lambda: _generate(model, ids, streams=2, num_beams=2),
        "a prompt": lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1),
        "a look at the streams": lambda: probe_streams(model, ids),
    }
    state, expected = model.base_model.stream_state, model(ids).logits
    interrupted = 0
    with torch.no_grad():
        for came in place(model, jobs[job]):
            interrupted += came
            assert state.run is state.chosen is state.default
            assert vars(state._thread) == {"chosen": None, "announced": None, "running": None}
    assert interrupted > 10
    assert model.streams == P
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kv", KVS)
def test_a_look_at_the_streams_beside_generate(kv: str) -> None:
    """It runs the streams unmerged; the others do not notice."""
    model = _model("llama", "lora", kv)
    first, second = _prompts(2)
    looks = [lambda: torch.tensor(probe_streams(model, first).stream_losses), lambda: _generate(model, second)]
    _together(model, looks)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no", "not reentrant", "reentrant"])
@pytest.mark.parametrize("kv", KVS)
def test_gradients(kv: str, checkpointing: bool | None) -> None:
    """Of passes in several threads, with gradient checkpointing too, each at the p that its thread runs."""
    model = parallelized(build("llama"), kv=kv, **DIVERSIFIERS["lora"])
    if checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing})
    state = model.base_model.stream_state
    model.train().requires_grad_(False)  # threads would add to one .grad

    def gradient(ids: Tensor, streams: int) -> Tensor:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        with state.using(streams=streams):
            logits = model(inputs_embeds=embeds, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        assert embeds.grad is not None
        return embeds.grad

    _together(model, [lambda i=i, p=p: gradient(i, p) for i, p in zip(_prompts(3), (1, 2, 3), strict=True)])


def test_parallelize() -> None:
    """Models of families that have no streams yet get them at once."""
    families = ["stablelm", "starcoder2"] * 2
    models, barrier = [build(family) for family in families], threading.Barrier(len(families), timeout=120)

    def give(model: Any) -> None:
        barrier.wait()
        parallelize(model, StreamsConfig(4, 5))

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(give, models))
    ids = _prompts(1)[0]
    for family, model in zip(families, models, strict=True):
        expected = with_streams(build(family))
        assert type(model) is type(expected)
        model.load_state_dict(expected.state_dict())
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    """In a process of its own: the compiler cannot look through the shape checks of this one."""
    command = [sys.executable, "-m", "tests.ecosystem.compiled", backend]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")
