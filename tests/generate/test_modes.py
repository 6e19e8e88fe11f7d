"""Every way of transformers 5 to choose the next token: each equals its own definition, written out without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from tests.small import NEW, VOCABULARY, build, greedy, uncached


def test_greedy(model: Any, ids: Tensor) -> None:
    assert torch.equal(greedy(model, ids), uncached(model, ids))


def test_greedy_from_embeddings(model: Any, ids: Tensor) -> None:
    embeds = model.get_input_embeddings()(ids)
    after = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(after, uncached(model, ids)[:, ids.shape[1] :])


def test_scores_are_the_uncached_logits(model: Any, ids: Tensor) -> None:
    made = greedy(model, ids, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logits = model(made.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.scores, dim=1), logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_sampling_with_a_seed(model: Any, ids: Tensor) -> None:
    torch.manual_seed(5)
    sampled = greedy(model, ids, do_sample=True, temperature=0.7, top_k=0)
    torch.manual_seed(5)
    expected = ids
    for _ in range(NEW):
        odds = (model(expected, use_cache=False).logits[:, -1] / 0.7).softmax(-1)
        expected = torch.cat([expected, torch.multinomial(odds, 1)], dim=1)
    assert torch.equal(sampled, expected)
    assert not torch.equal(sampled, uncached(model, ids))


@torch.no_grad()
def beam_by_hand(model: Any, prompt: Tensor, beams: int) -> Tensor:
    """Keep the likeliest `beams` sequences at every step; the likeliest in the end. One prompt (T,)."""
    kept, scores = prompt[None], torch.zeros(1)
    for _ in range(NEW):
        grown = scores[:, None] + model(kept, use_cache=False).logits[:, -1].log_softmax(-1)
        scores, best = grown.flatten().topk(beams)
        kept = torch.cat([kept[best // VOCABULARY], best[:, None] % VOCABULARY], dim=1)
    return kept[scores.argmax()]


def test_beam_search(model: Any, ids: Tensor) -> None:
    expected = torch.stack([beam_by_hand(model, prompt, beams=3) for prompt in ids])
    assert torch.equal(greedy(model, ids, num_beams=3), expected)
    assert not torch.equal(expected, uncached(model, ids))


def test_beam_search_left_padded(model: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    made = greedy(model, ids * mask, attention_mask=mask, num_beams=3)[:, ids.shape[1] :]
    assert torch.equal(made[1], beam_by_hand(model, ids[1, 4:], beams=3)[5:])
    assert torch.equal(made[0], beam_by_hand(model, ids[0], beams=3)[9:])


def test_beam_sampling_keeps_each_beam_with_its_cache(model: Any, ids: Tensor) -> None:
    options = {"num_beams": 3, "do_sample": True, "top_k": 0}
    torch.manual_seed(6)
    cached = greedy(model, ids, **options)
    torch.manual_seed(6)
    assert torch.equal(cached, greedy(model, ids, **options, use_cache=False))


def test_several_samples_of_a_prompt(model: Any, ids: Tensor) -> None:
    torch.manual_seed(7)
    made = greedy(model, ids, do_sample=True, top_k=0, num_return_sequences=2)
    torch.manual_seed(7)
    assert torch.equal(made, greedy(model, ids.repeat_interleave(2, dim=0), do_sample=True, top_k=0))


def test_contrastive_search_is_gone_from_transformers(model: Any, ids: Tensor) -> None:
    """5.x refuses it for every model; this library does not bring it back."""
    with pytest.raises(ValueError, match=r"[Cc]ontrastive"):
        greedy(model, ids[:1], penalty_alpha=0.6, top_k=4)


@pytest.mark.parametrize("draft", ["plain", "one stream", "all streams"])
def test_assisted(model: Any, ids: Tensor, draft: str) -> None:
    drafts = {
        "plain": build,
        "one stream": lambda: model.with_streams(1),
        "all streams": lambda: model.with_streams(4),
    }
    for prompt in ids.split(1):
        made = greedy(model, prompt, assistant_model=drafts[draft]())
        assert torch.equal(made, uncached(model, prompt))
    assert model.streams == 4


def test_assisted_by_itself_accepts_every_draft(model: Any, ids: Tensor) -> None:
    """The draft decodes as the target does: a step of the target takes all four of the draft's tokens and one more."""
    draft = model.with_streams(4)
    draft.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    greedy(model, ids[:1], assistant_model=draft)
    hook.remove()
    assert len(calls) == 2


def test_prompt_lookup(model: Any, ids: Tensor) -> None:
    prompt = ids[:1].repeat(1, 2)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=3), uncached(model, prompt))


class Tape(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming_gives_each_token_once(model: Any, ids: Tensor) -> None:
    tape = Tape()
    made = greedy(model, ids[:1], streamer=tape)
    assert tape.tokens == made[0].tolist()
    assert tape.ended


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_text_streamers(model: Any, ids: Tensor, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = " ".join(f"w{i}" for i in uncached(model, ids[:1])[0, ids.shape[1] :].tolist())
    greedy(model, ids[:1], streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
    greedy(model, ids[:1], streamer=pieces)
    assert "".join(pieces).strip() == expected
