"""pass@k against its definition, problems as they are published, and a model whose answers are known."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from parscale.cli import main
from parscale.errors import InputError
from parscale.evaluate import code
from parscale.evaluate.code import judge, pass_at_k, problem_of, read_problems, run_code, score
from parscale.evaluate.code_options import CodeOptions
from parscale.evaluate.sandbox import Outcome, available

sandboxed = pytest.mark.skipif(not available(), reason="the sandbox needs Linux on x86_64 or aarch64")
ADD = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
DOUBLE = {
    "task_id": 7,
    "text": "Write a function to double a number.",
    "code": "def double(x):\n    return helper(x)",
    "test_setup_code": "def helper(x): return 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(4) == 8"],
}


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(n: int) -> None:
    for correct in range(n + 1):
        right = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in combinations(right, k)]
            assert pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_scores_are_means_over_problems() -> None:
    outcomes = [[Outcome(i < correct) for i in range(10)] for correct in (0, 1, 10)]
    one, ten = score(outcomes)
    assert (one["metric"], one["value"]) == ("pass@1", pytest.approx((0 + 0.1 + 1) / 3))
    assert (ten["metric"], ten["value"]) == ("pass@10", pytest.approx(2 / 3))
    assert 0 <= one["low"] < one["value"] < one["high"] <= 1


@sandboxed
def test_problems_of_both_formats_are_judged_by_their_tests() -> None:
    problems = [problem_of(ADD, "row 1"), problem_of(DOUBLE, "row 2")]
    assert problems[0].prompt == ADD["prompt"]
    assert problems[1].prompt == '"""\nWrite a function to double a number.\nassert double(1) == 2\n"""\n'
    completions = [
        ["    return a + b", "    return a - b", "    return"],
        [DOUBLE["code"], "def double(x): return 2", "("],
    ]
    passed = [[outcome.passed for outcome in of] for of in judge(problems, completions, CodeOptions())]
    assert passed == [[True, False, False], [True, False, False]]


@pytest.mark.parametrize("row", [{"prompt": "x"}, {"test_list": ["assert True"]}, {}])
def test_a_row_that_is_no_problem_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="row 3: give prompt"):
        problem_of(row, "row 3")


def test_nothing_is_run_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "no-model", "--code", str(tmp_path / "x.jsonl")]) == 2
    assert "add --execute" in capsys.readouterr().err
    assert main(["eval", "no-model", "--code", "x.jsonl", "--tasks", "piqa"]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "named"), [({"samples": 3}, "temperature=0"), ({"samples": 0}, "samples=0")])
def test_options_that_make_no_sense(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        CodeOptions(**options)


@sandboxed
def test_a_known_model_gets_its_known_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two samples of each of two problems: one of the four is right."""

    class Adapter:
        max_length = 1000

        def generate_until(self, requests: list[Any]) -> list[str]:
            assert [request.args[0] for request in requests] == [ADD["prompt"]] * 2 + [
                problem_of(DOUBLE, "").prompt
            ] * 2
            assert requests[0].args[1]["max_gen_toks"] == 512
            return ["    return a + b", "    return 0", "def double(x): pass", "import os; os._exit(0)"]

    pytest.importorskip("lm_eval")
    monkeypatch.setattr(code, "harness_model", lambda *_: Adapter())
    monkeypatch.setattr(code, "ready_model", lambda *_: (None, None))
    file, out = tmp_path / "p.jsonl", tmp_path / "deep" / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ADD, DOUBLE)))
    options = CodeOptions(execute=True, samples=2, temperature=0.8, samples_out=out)
    (one,) = run_code("model", str(file), options, as_json=True)["scores"]
    assert one["value"] == pytest.approx(0.25)
    assert json.loads(capsys.readouterr().out)[0] == one
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["passed"] for line in lines] == [True, False, False, False]
    assert [line["task_id"] for line in lines] == ["T/0", "T/0", "7", "7"]


@sandboxed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "solution", "least"), [("HumanEval", "canonical_solution", 1.0), ("mbpp", "code", 0.98)]
)
def test_published_solutions_pass(file: str, solution: str, least: float, shared: Path) -> None:
    """Every tenth problem with its own solution; those of MBPP are not all right."""
    rows = [row for _, row in code.read_rows(str(shared / "data" / "evals" / f"{file}.jsonl.zst"))][::10]
    outcomes = judge([problem_of(row, "") for row in rows], [[row[solution]] for row in rows], CodeOptions())
    assert sum(of[0].passed for of in outcomes) >= least * len(rows), [
        of[0].reason for of in outcomes if not of[0].passed
    ]


def test_an_empty_file_has_no_problems(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(InputError, match=r"no problem"):
        read_problems(str(tmp_path / "p.jsonl"))


def test_nothing_to_test_or_to_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a test_list of one or more"):
        problem_of(DOUBLE | {"test_list": []}, "here")
    with pytest.raises(InputError, match="limit=0 is not accepted"):
        run_code("none", str(tmp_path), CodeOptions(execute=True), limit=0)
