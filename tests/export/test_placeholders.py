"""The tokenizer that goes with OpenVINO's paged attention: n placeholders in front of whatever it gave before."""

from typing import Any

import pytest
from tokenizers import processors

from parscale.errors import InputError
from parscale.export.openvino import PLACEHOLDER, put_placeholders_in_front
from parscale.train.data import END_OF_TEXT, train_tokenizer

BEGIN = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
OWN = {
    "none": None,
    "byte level": processors.ByteLevel(),
    "a token in front": BEGIN,
    "both": processors.Sequence([processors.ByteLevel(), BEGIN]),
}


def tokenizer_with(post_processor: Any) -> Any:
    tokenizer = train_tokenizer(["some text, and more of it"], 300)
    if post_processor is not None:
        tokenizer.backend_tokenizer.post_processor = post_processor
    return tokenizer


@pytest.mark.parametrize("own", OWN)
def test_a_text_starts_with_them(own: str) -> None:
    before = tokenizer_with(OWN[own])("some text")["input_ids"]
    tokenizer = tokenizer_with(OWN[own])
    placeholder = put_placeholders_in_front(tokenizer, 3)
    assert placeholder not in before
    assert tokenizer("some text")["input_ids"] == [placeholder] * 3 + before
    assert tokenizer.decode(tokenizer("some text")["input_ids"], skip_special_tokens=True) == "some text"


def test_a_chat_starts_with_them() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    placeholder = put_placeholders_in_front(tokenizer, 3)
    seen = tokenizer.apply_chat_template([{"role": "user", "content": "some"}], tokenize=False)
    ids = tokenizer(seen, add_special_tokens=False)["input_ids"]
    assert seen == PLACEHOLDER * 3 + "some"
    assert ids[:3] == [placeholder] * 3
    assert placeholder not in ids[3:]


def test_another_kind_is_refused() -> None:
    tokenizer = tokenizer_with(processors.RobertaProcessing((END_OF_TEXT, 0), (END_OF_TEXT, 0)))
    with pytest.raises(InputError, match="RobertaProcessing"):
        put_placeholders_in_front(tokenizer, 3)
