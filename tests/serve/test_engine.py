"""What is served and what is refused, and answers under a cache that is too small for all of them at once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from parscale.cli import main
from parscale.errors import InputError
from parscale.serve.answer import Answer
from parscale.serve.engine import Engine, EngineDead
from parscale.serve.limits import Limits
from tests.serve.processes import offline, save
from tests.small import build, with_streams

PROMPTS = ["def main(", "0123456789" * 6, "x", "import os"]


def answers(engine: Engine, tokenizer: Any, streams: int, new: int = 40) -> list[str]:
    async def ask() -> list[str]:
        await engine.manager(streams)
        ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        answer = Answer(
            engine, ids, streams=streams, new_tokens=new, samplings=[None] * len(ids), stops=[], each_token=False
        )
        try:
            return [piece.text for piece in await answer.whole()]
        finally:
            answer.close()

    try:
        return asyncio.run(ask())
    finally:
        engine.close()


def test_requests_that_do_not_fit_the_cache_together(model: Any, tokenizer: Any) -> None:
    """Some wait, some lose their cache and are read again; the answers are the same, and the engine lives."""
    engine = Engine(model, tokenizer, Limits(cache_tokens=128, max_requests=8))
    assert answers(engine, tokenizer, 4) == [offline(model, tokenizer, prompt, 40, 4) for prompt in PROMPTS]
    assert engine.running == engine.scheduled() == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_streams_is_served(family: str, tokenizer: Any) -> None:
    plain = build(family, vocab_size=258, num_key_value_heads=4)
    expected = [offline_plain(plain, tokenizer, prompt) for prompt in PROMPTS]
    assert answers(Engine(plain, tokenizer, Limits()), tokenizer, 1) == expected
    with pytest.raises(InputError, match=r"streams=2.*has 1"):
        Engine(plain, tokenizer, Limits(), streams=2)


def offline_plain(plain: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=256
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_streams_with_shared_keys_and_values(tokenizer: Any) -> None:
    shared = with_streams(build(vocab_size=258), kv="shared", diversify=("prefix", "lora"))
    engine = Engine(shared, tokenizer, Limits(cache_tokens=512))
    assert answers(engine, tokenizer, 4) == [offline(shared, tokenizer, prompt, 40, 4) for prompt in PROMPTS]


HYBRID = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip


LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 4, "first_k_dense_replace": 2,
}  # fmt: skip


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize(
    ("family", "config"), [("qwen3_next", HYBRID), ("deepseek_v3", LATENT), ("bloom", {"n_head": 4})]
)
def test_what_cannot_be_paged_is_refused(family: str, config: dict, streams: int, tokenizer: Any) -> None:
    model = build(family, vocab_size=258, **config)
    with pytest.raises(InputError) as error:
        Engine(with_streams(model, streams=streams) if streams else model, tokenizer, Limits()).open(max(streams, 1))
    assert "\n" not in str(error.value)


def test_a_cache_that_finds_no_memory_is_refused_in_one_line(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise MemoryError("Memory footprint 1.0 is more than available memory 0.5")

    monkeypatch.setattr(model, "init_continuous_batching", fail)
    with pytest.raises(InputError, match="cannot be served: Memory footprint"):
        Engine(model, tokenizer, Limits()).open(1)


def test_an_engine_that_died_says_so(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, tokenizer, Limits())
    engine.open(1)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.managers[1].batch_processor.scheduler, "schedule_batch", fail)
    with pytest.raises(EngineDead, match="out of memory"):
        answers(engine, tokenizer, 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("./nowhere",), "nowhere"),
        (("folder", "--streams", "5"), "streams=5"),
        (("folder", "--port", "99999"), "port=99999"),
        (("folder", "--host", "203.0.113.7"), "203.0.113.7"),
        (("folder", "--max-requests", "0"), "max_requests=0"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    arguments: tuple[str, ...], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *(str(folder) if one == "folder" else one for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert main(["serve", str(folder)]) == 2
    assert "pip install 'parscale[serve]'" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, build(vocab_size=200), tokenizer)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "more tokens than the model" in capsys.readouterr().err
