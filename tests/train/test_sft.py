"""Supervised fine-tuning: which tokens are labels, what a run learns, and which rows are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model
from parscale.train.config import TrainConfig
from parscale.train.prepare import prepare
from parscale.train.sft import PLAIN_TEMPLATE, examples_of, load_chats
from parscale.train.trainer import train
from tests.train.conftest import run

CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def tokenizer(base: Path):
    loaded = AutoTokenizer.from_pretrained(base)
    loaded.chat_template = PLAIN_TEMPLATE
    return loaded


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def capitals(count: int) -> list[dict]:
    """Questions whose answer is their word in capitals."""
    words = [f"{a}{b}" for a in ("ab", "cd", "ef", "gh", "ij") for b in ("kl", "mn", "op", "qr", "st", "uv")]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} {number}"},
                {"role": "assistant", "content": word.upper()},
            ]
        }
        for number in range(count)
        for word in words
    ][:count]


def test_every_answer_is_an_example_and_nothing_else_is_a_label(tokenizer) -> None:
    shown = []
    for ids, prompt in examples_of({"messages": CHAT}, "here", tokenizer):
        shown.append((tokenizer.decode(ids[:prompt]), tokenizer.decode(ids[prompt:])))
    end = tokenizer.eos_token
    first = "system:\nAnswer.\n\nuser:\nOne?\n\nassistant:\n"
    second = f"{first}Yes, one.{end}\n\nuser:\nTwo?\n\nassistant:\n"
    assert shown == [(first, f"Yes, one.{end}"), (second, f"No.{end}")]


def test_a_prompt_with_its_completion(tokenizer) -> None:
    ((ids, prompt),) = examples_of({"prompt": "1 + 1 =", "completion": " 2"}, "here", tokenizer)
    assert tokenizer.decode(ids[:prompt]) == "1 + 1 ="
    assert tokenizer.decode(ids[prompt:]) == f" 2{tokenizer.eos_token}"


def test_the_batches_have_labels_on_the_answer_alone_and_streams_learn_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    seen = []
    forward = torch.nn.Module.__call__

    def watching(module, *args, **kwargs):
        if "labels" in kwargs and kwargs["labels"] is not None:
            seen.append({name: kwargs[name].clone() for name in ("input_ids", "labels", "attention_mask")})
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", watching)
    config = run(
        "sft",
        tmp_path / "chat",
        model=str(base),
        data=(write(tmp_path / "chats.jsonl", capitals(90)),),
        chat_template="plain",
        streams=StreamsConfig(2, 4, diversify=("prefix", "lora")),
        block_size=64,
        tokens=12_000,
        learning_rate=1e-2,
    )
    result = train(config)
    assert result.validation_loss < 0.5 * result.start_loss
    assert result.probe is not None

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert len(seen) > 10
    for batch in seen:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            answer = labels != -100
            assert torch.equal(ids[answer], labels[answer])
            prompt, said = tokenizer.decode(ids[~answer & (mask == 1)]), tokenizer.decode(ids[answer])
            assert prompt.endswith("\n\nassistant:\n")
            assert said == prompt.split()[1].upper() + tokenizer.eos_token

    model = load_model(tmp_path / "chat").eval()
    assert model.streams == 2
    assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False) == "system:\nAnswer.\n\nuser:\nOne?"


def test_validation_loss_is_of_the_answers(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = capitals(40)
    config = run(
        "sft",
        tmp_path / "out",
        model=str(base),
        data=(write(tmp_path / "train.jsonl", rows[:38]),),
        validation=(write(tmp_path / "held-out.jsonl", rows[38:]),),
        chat_template="plain",
        streams=StreamsConfig(1, 0),
        block_size=64,
        tokens=512,
    )
    result = train(config)
    text = load_chats(config, AutoTokenizer.from_pretrained(base))
    model = load_model(tmp_path / "out").eval()
    losses = []
    for row in text.validation:
        ids = torch.tensor([row["input_ids"]])
        labels = ids.masked_fill(torch.tensor([row["completion_mask"]]) == 0, -100)
        with torch.no_grad():
            losses += [model(ids, labels=labels).loss.item()] * sum(row["completion_mask"])
    assert result.validation_loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_validation_loss_does_not_depend_on_the_batch(base: Path, tmp_path: Path) -> None:
    """A long answer among short ones: each of its tokens counts as much as one of theirs."""
    pytest.importorskip("trl")
    rows = [{"prompt": f"v {i}", "completion": " a" * (20 if i % 4 == 0 else 1) + str(i)} for i in range(9)]
    data = (write(tmp_path / "train.jsonl", capitals(20)),)
    held_out = (write(tmp_path / "held-out.jsonl", rows),)
    settings = {"model": str(base), "chat_template": "plain", "streams": StreamsConfig(1, 0), "block_size": 64}
    settings |= {"data": data, "validation": held_out, "tokens": 300, "evaluations": 1}
    config = run("sft", tmp_path / "1", **settings, batch_size=1)
    model = load_model(base).eval()
    nats, count = 0.0, 0
    for row in load_chats(config, AutoTokenizer.from_pretrained(base)).validation:
        ids = torch.tensor([row["input_ids"]])
        labels = ids.masked_fill(torch.tensor([row["completion_mask"]]) == 0, -100)
        with torch.no_grad():
            nats += model(ids, labels=labels).loss.item() * sum(row["completion_mask"])
        count += sum(row["completion_mask"])
    found = [train(run("sft", tmp_path / str(size), **settings, batch_size=size)).start_loss for size in (1, 2, 4)]
    assert found == pytest.approx([nats / count] * 3, abs=1e-5)


def test_another_template_is_another_text(tokenizer, tmp_path: Path) -> None:
    """A run does not go on with examples that have changed under it."""
    data, template = write(tmp_path / "chats.jsonl", capitals(4)), tmp_path / "template.jinja"
    config = TrainConfig("sft", tmp_path / "out", data=(data,), block_size=64, chat_template=str(template))
    seen = set()
    for name in ("a", "a", "b"):
        template.write_text("{% for m in messages %}" + name + "{{ m['role'] }}{{ m['content'] }}{% endfor %}")
        seen.add(load_chats(config, tokenizer).fingerprint)
    assert len(seen) == 2


def test_rows_on_both_sides_are_refused(tokenizer, tmp_path: Path) -> None:
    rows = capitals(4)
    data, held_out = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[3:])
    config = TrainConfig("sft", tmp_path / "out", data=(data,), validation=(held_out,))
    with pytest.raises(InputError, match=r"b\.jsonl:1 is in the training data too, as .*a\.jsonl:4"):
        load_chats(config, tokenizer)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": "no"}, r"a\.jsonl:1: give a list `messages`, or the texts `prompt` and `completion`; here are text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "`messages` must be a list of objects with a role"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": CHAT[:2]}, "no answer for training is in it"),
        ({"prompt": "a " * 300, "completion": "b"}, r"tokens, block_size=256; raise it"),
    ],
)
def test_bad_rows_are_named(row: dict, named: str, tokenizer, tmp_path: Path) -> None:
    data = (write(tmp_path / "a.jsonl", [row, row | {"id": 1, "prompt": "q"}] if "messages" in row else [row] * 2),)
    with pytest.raises(InputError, match=named):
        load_chats(TrainConfig("sft", tmp_path / "out", data=data), tokenizer)


def test_long_examples_are_left_out_where_that_is_asked(
    tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = capitals(10)
    config = TrainConfig("sft", tmp_path / "out", data=(write(tmp_path / "a.jsonl", rows),))
    longer = [{"prompt": "a " * (300 + i), "completion": "b"} for i in range(3)]
    with_long = TrainConfig("sft", tmp_path / "out", data=(write(tmp_path / "b.jsonl", rows + longer),))
    kept = load_chats(with_long, tokenizer, leave_out_long=True)
    whole = load_chats(config, tokenizer)
    assert len(kept.train) + len(kept.validation) == len(whole.train) + len(whole.validation)
    told = re.findall(r"(\d) of \d+ examples for \w+ are longer than 256 tokens, and left out", capsys.readouterr().err)
    assert sum(map(int, told)) == 3


def test_a_tokenizer_without_a_template_is_told_what_to_do(base: Path, tmp_path: Path) -> None:
    data = (write(tmp_path / "a.jsonl", capitals(5)),)
    with pytest.raises(InputError, match="has no chat template: give chat_template='plain' or a Jinja"):
        prepare(TrainConfig("sft", tmp_path / "out", model=str(base), data=data))
    with pytest.raises(InputError, match=r"chat_template='none\.jinja'"):
        prepare(TrainConfig("sft", tmp_path / "out", model=str(base), data=data, chat_template="none.jinja"))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m['content'] }", "unexpected"),
        ("{{ raise_exception('no system here') }}", "no system here"),
    ],
)
def test_a_template_that_cannot_be_applied_is_one_line(template: str, told: str, tokenizer) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=rf"here: the chat template cannot be applied to it \({told}.*\)") as refused:
        list(examples_of({"messages": CHAT}, "here", tokenizer))
    assert "\n" not in str(refused.value)


def test_half_of_a_surrogate_pair_is_refused(tokenizer, tmp_path: Path) -> None:
    data = (write(tmp_path / "a.jsonl", [{"prompt": "x \ud800", "completion": "y"}]),)
    with pytest.raises(InputError, match=r"a\.jsonl:1: half of a surrogate pair"):
        load_chats(TrainConfig("sft", tmp_path / "out", data=data), tokenizer)


def test_a_template_that_hides_the_prompt_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{% if add_generation_prompt %}Q{% else %}{{ messages[-1]['content'] }}{% endif %}"
    with pytest.raises(InputError, match="prompt is not the beginning of the conversation"):
        list(examples_of({"messages": CHAT}, "here", tokenizer))
