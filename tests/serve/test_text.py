"""Text piece by piece: it adds up to the tokenizer's decoding, and ends at stop texts wherever the pieces are cut."""

import itertools
import random
from typing import Any

import pytest

from parscale.serve.text import TextStream
from tests.serve.processes import tokens_for

TEXT = "Ein Häschen 🐇 hüpft, 兔子 too.\n"


def pieces_of(stream: TextStream, tokens: list[int], cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cuts), len(tokens)]
    pieces = [stream.feed(tokens[a:b]) for a, b in itertools.pairwise(bounds)]
    return pieces if stream.stopped else [*pieces, stream.end()]


@pytest.mark.parametrize("text", [TEXT, "", "🐇", None])
def test_pieces_add_up_to_the_decoding(text: str | None, tokenizer: Any) -> None:
    tokens = tokens_for(1, 80) if text is None else tokenizer(text)["input_ids"]
    tokens = [*tokens[:5], 257, *tokens[5:]]  # a special token, which is not text
    draw = random.Random(0)
    for _ in range(20):
        cuts = [draw.randint(0, len(tokens)) for _ in range(draw.randint(0, 30))]
        pieces = pieces_of(TextStream(tokenizer, []), tokens, cuts)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_is_given_when_its_last_byte_is_there(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [])
    assert [stream.feed([token]) for token in tokenizer("a🐇b")["input_ids"]] == ["a", "", "", "", "🐇", "b"]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["hüpft"], "Ein Häschen 🐇 "),
        (["兔子 nowhere", "too"], "Ein Häschen 🐇 hüpft, 兔子 "),
        (["ü", "pft", "hü"], "Ein Häschen 🐇 "),
        (["nowhere", "\n\n"], TEXT),
        (["Ein"], ""),
    ],
)
def test_a_stop_text_wherever_the_pieces_are_cut(stops: list[str], expected: str, tokenizer: Any) -> None:
    tokens = tokenizer(TEXT)["input_ids"]
    for size in (1, 2, 3, 7, len(tokens)):
        stream = TextStream(tokenizer, stops)
        pieces = pieces_of(stream, tokens, list(range(size, len(tokens), size)))
        assert "".join(pieces) == expected
        assert stream.stopped == (expected != TEXT)
        assert stream.feed(tokens) == "" or not stream.stopped
