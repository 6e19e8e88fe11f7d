"""lm-evaluation-harness on a model with streams, against scores worked out token by token, from local files alone."""

import json
from pathlib import Path

import pytest
import torch

from parscale.cli import main
from parscale.errors import InputError
from parscale.evaluate.harness import harness_model, run_tasks, tabulate
from parscale.load import load_model, load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]
QUESTIONS = [
    {"question": "import", "choices": ["os", "of the people", "(((("], "answer": 0},
    {"question": "def main(argv):", "choices": ["return", "zebra", "x = 1; y = 2"], "answer": 1},
    {"question": "for i in", "choices": ["range(n):", "a"], "answer": 1},
    {"question": "class Parser:\n   ", "choices": ["pass", "def __init__(self):"], "answer": 0},
    {"question": "return", "choices": ["None", "self.value"], "answer": 1},
]
CHOICE = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def task(folder: Path, template: str, rows: list[dict]) -> str:
    name = template.split()[1]
    data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(template.format(data=data))
    return str(file)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("streams", [None, 1])
def test_choices_are_scored_by_their_likelihood(streams: int | None, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    found = run_tasks(str(model), [task(tmp_path, CHOICE, QUESTIONS)], streams=streams, batch_size=4)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    if streams:
        loaded.set_streams(streams)
    plain, normed = 0, 0
    for row in QUESTIONS:
        question = row["question"].rstrip()
        spaces = row["question"][len(question) :]
        sums = []
        for choice in row["choices"]:
            before = tokenizer(question)["input_ids"]
            ids = torch.tensor(tokenizer(f"{question}{spaces} {choice}")["input_ids"])
            with torch.no_grad():
                logs = loaded(ids[None]).logits[0].double().log_softmax(-1)
            sums.append(sum(logs[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
        plain += max(range(len(sums)), key=sums.__getitem__) == row["answer"]
        lengths = [len(choice) for choice in row["choices"]]
        normed += max(range(len(sums)), key=lambda i: sums[i] / lengths[i]) == row["answer"]
    values = {entry["metric"]: entry["value"] for entry in found["rows"]}
    assert values == {"acc": pytest.approx(plain / 5), "acc_norm": pytest.approx(normed / 5)}
    assert {entry["questions"] for entry in found["rows"]} == {5}


def test_answers_are_written_by_all_streams(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of unequal length in one batch, against each by itself; the last answer is made wrong."""
    pytest.importorskip("lm_eval")
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    rows = []
    for question in ("import os", "def main(argv):\n    parser", "x"):
        ids = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
        out = loaded.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        rows.append({"question": question, "answer": tokenizer.decode(out, skip_special_tokens=True)})
    rows[-1]["answer"] += "wrong"
    written, chosen = task(tmp_path, WRITTEN, rows), task(tmp_path, CHOICE, QUESTIONS)
    capsys.readouterr()
    assert main(["eval", str(model), "--tasks", written, chosen, "--batch-size", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    values = {(entry["task"], entry["metric"]): entry["value"] for entry in found["rows"]}
    assert values["written", "exact_match"] == pytest.approx(2 / 3)
    assert found["average"] == pytest.approx((2 / 3 + values["choices", "acc_norm"]) / 2)


def test_what_cannot_be_run_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text(Path(task(tmp_path, CHOICE, QUESTIONS)).read_text() + "unsafe_code: true\n")
    for tasks, named in ((["no-such-task"], "no-such-task"), ([str(unsafe)], "--code")):
        assert main(["eval", str(model), "--tasks", *tasks]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("parscale: ")
        assert named in error


def test_without_the_harness_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(InputError, match=r"parscale\[eval\]"):
        harness_model(None, None, 1)


def test_members_of_a_group_are_not_rows() -> None:
    results = {
        "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "mmlu_law": {"acc,none": 0.4},
        "gsm8k": {"exact_match,strict-match": 0.2, "exact_match,flexible-extract": 0.3},
        "piqa": {"acc,none": 0.6, "acc_norm,none": 0.7, "sample_len": 3},
    }
    found = tabulate({"results": results, "group_subtasks": {"mmlu": ["mmlu_law"]}, "n-shot": {}, "n-samples": {}})
    assert [(row["task"], row["metric"], row["value"]) for row in found["rows"]] == [
        ("mmlu", "acc", 0.5),
        ("gsm8k", "exact_match (strict-match)", 0.2),
        ("gsm8k", "exact_match (flexible-extract)", 0.3),
        ("piqa", "acc", 0.6),
        ("piqa", "acc_norm", 0.7),
    ]
    assert found["average"] == pytest.approx((0.5 + 0.2 + 0.7) / 3)
    assert found["rows"][0]["standard error"] == 0.1
