"""Tokens in, text out: decoding that can be sent piece by piece and ends at a stop text.

The pieces add up to the tokenizer's own decoding of all tokens, whatever the pieces were.
"""

from typing import Any

UNFINISHED = "\ufffd"
"""What a decoder gives for the first bytes of a character whose last ones are still to come."""


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: decodes, without special tokens.
        stops: texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self.tokens: list[int] = []
        # Tokens from `_next` on have not been given yet. They are decoded together with those from `_context` on, for
        # decoders to which a token's text depends on its neighbours; `_given` is the text of these alone.
        self._context, self._next, self._given = 0, 0, ""
        self._held = ""  # could be the beginning of a stop text

    def feed(self, tokens: list[int]) -> str:
        """The text that is certain now and was not before."""
        for token in tokens:
            self.tokens.append(token)
            text = self._decode()
            if len(text) > len(self._given) and not text.endswith(UNFINISHED):
                self._held += text[len(self._given) :]
                self._context, self._next = self._next, len(self.tokens)
                self._given = self._decode()
        return self._until_stop(whole=False)

    def end(self) -> str:
        """What is left when no token comes any more."""
        self._held += self._decode()[len(self._given) :]
        self._context = self._next = len(self.tokens)
        return self._until_stop(whole=True)

    def _decode(self) -> str:
        return self.tokenizer.decode(self.tokens[self._context :], skip_special_tokens=True)

    def _until_stop(self, whole: bool) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if whole else max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
