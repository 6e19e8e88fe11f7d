"""The folded graph against the model that it was made from, in float64: whole prompts, cached steps, padding."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from parscale.errors import InputError
from parscale.export.folded import FoldedDecoder
from tests.small import VOCABULARY, build, with_streams

CASES = {
    "the paper's": ("qwen2", {}),
    "two of four": ("qwen2", {"active": 2}),
    "one of four": ("llama", {"active": 1}),
    "control": ("llama", {"streams": 1}),
    "mean": ("mistral", {"aggregate": "mean"}),
    "all diversifiers": ("qwen3", {"diversify": ("prefix", "embedding", "lora", "rank1")}),
    "no prefix": ("llama", {"diversify": ("lora",), "active": 3}),
    "shared": ("qwen3", {"diversify": ("lora", "rank1"), "kv": "shared"}),
    "shared prefix": ("qwen2", {"diversify": ("prefix", "embedding"), "kv": "shared", "shared_prefix": True}),
    "targets": ("qwen2", {"diversify": ("prefix", "lora"), "lora_targets": ("q_proj", "up_proj")}),
    "plain first": ("qwen3", {"diversify": ("lora",), "kv": "shared", "plain_first": True}),
    "plain": ("qwen3", None),
}


def model_of(case: str) -> Any:
    family, streams = CASES[case]
    options = {"sliding_window": None} if family == "mistral" else {}
    model = build(family, **options)
    if streams is None:
        return model.double()
    active = streams.get("active")
    with_streams(model, **{key: value for key, value in streams.items() if key != "active"})
    for module in model.modules():  # LoRA starts at zero, where it would prove nothing
        if hasattr(module, "stream_lora_b"):
            module.stream_lora_b.data.normal_(std=0.3)
    if active is not None:
        model.set_streams(active)
    return model.double()


def run(
    decoder: FoldedDecoder, ids: Tensor, past: list[Tensor], mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One step behind `past`; returns logits and the cache."""
    cached = past[0].shape[2]
    mask = torch.ones(ids.shape[0], cached + ids.shape[1], dtype=torch.long) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, cached:]
    logits, *present = decoder(ids, mask, positions, past)
    return logits, present


def nothing(decoder: FoldedDecoder, rows: int) -> list[Tensor]:
    return [torch.zeros(rows, decoder.kv_heads, 0, decoder.head_dim, dtype=torch.float64) for _ in decoder.cache_names]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prompt_and_cached_steps(case: str) -> None:
    model = model_of(case)
    ids = torch.randint(VOCABULARY, (2, 11))
    expected = model(input_ids=ids, use_cache=False).logits
    decoder = FoldedDecoder(model).eval()
    whole, _ = run(decoder, ids, nothing(decoder, 2))
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    logits, past = run(decoder, ids[:, :6], nothing(decoder, 2))
    steps = [logits]
    for token in range(6, 11):
        logits, past = run(decoder, ids[:, token : token + 1], past)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["the paper's", "shared prefix", "plain"])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(case: str) -> None:
    model = model_of(case)
    decoder = FoldedDecoder(model).eval()
    ids = torch.randint(VOCABULARY, (1, 7))
    alone, _ = run(decoder, ids, nothing(decoder, 1))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    beside, _ = run(decoder, padded, nothing(decoder, 1), mask)
    torch.testing.assert_close(beside[:, 3:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["the paper's", "shared prefix"])
@torch.no_grad()
def test_placeholders_are_the_prefix(case: str) -> None:
    model, marker = model_of(case), VOCABULARY + 2
    constant, decoder = FoldedDecoder(model).eval(), FoldedDecoder(model, "placeholders", marker).eval()
    ids = torch.randint(VOCABULARY, (1, 9))
    expected, _ = run(constant, ids, nothing(constant, 1))
    n = decoder.prefix_tokens
    marked = torch.cat([torch.full((1, n), marker), ids], dim=1)
    logits, past = run(decoder, marked[:, : n + 4], nothing(decoder, 1))
    rest, _ = run(decoder, marked[:, n + 4 :], past)
    found = torch.cat([logits[:, n:], rest], dim=1)
    assert found.shape[-1] == marker + 1
    torch.testing.assert_close(found[..., :VOCABULARY], expected, rtol=1e-9, atol=1e-9)
    assert (found.argmax(-1) < VOCABULARY).all()


@torch.no_grad()
def test_a_prompt_without_placeholders_is_spoiled_not_overwritten() -> None:
    decoder = FoldedDecoder(model_of("the paper's"), "placeholders", VOCABULARY + 2).eval()
    logits, _ = run(decoder, torch.randint(VOCABULARY, (1, 12)), nothing(decoder, 1))
    assert logits[..., :VOCABULARY].isnan().all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for the old name
def test_what_cannot_be_folded_is_refused_in_one_line() -> None:
    lora = get_peft_model(with_streams(build()), LoraConfig(target_modules=["q_proj"]))
    quantised = get_peft_model(with_streams(build()), LoraConfig(target_modules=["q_proj"])).get_base_model()
    quantised.is_quantized = True  # what transformers sets where weights are in few bits
    for model, reason in (
        (build("gpt2"), "model type 'gpt2'"),
        (build("mistral", sliding_window=8), "sliding window"),
        (with_streams(build(), kv="shared"), "shared_prefix=True"),
        (build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (with_streams(build(), prefix_init="reparameterized"), "generates its prefixes; save it, load it again"),
        (lora, r"LoRA beside its weights; merge it with merge_and_unload\(\)"),
        (lora.get_base_model(), r"LoRA beside its weights; merge it with merge_and_unload\(\)"),
        (quantised, "holds quantised weights"),
    ):
        with pytest.raises(InputError, match=reason) as refusal:
            FoldedDecoder(model)
        assert "\n" not in str(refusal.value)
    FoldedDecoder(lora.merge_and_unload())
