"""`parscale eval --code`: pass@k on problems in the format of HumanEval or MBPP; what a model wrote runs in a sandbox.

pass@k is the chance that one of k samples solves a problem: 1 − C(n−c, k) / C(n, k) for c of n samples that do (Chen et
al. 2021, equation 1).
"""

# pyright: reportMissingImports=false

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parscale.errors import InputError
from parscale.evaluate.code_options import CodeOptions
from parscale.evaluate.harness import harness_model
from parscale.evaluate.perplexity import bootstrap_of_documents, ready_model
from parscale.evaluate.sandbox import Outcome, run_program
from parscale.output import print_json, print_table
from parscale.train.corpus import read_rows
from parscale.utils.files import write_text

STOPS = ("\nif __name__", "\ndef main(", "\nprint(", "\n```")
STOPS_HUMANEVAL = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
STOPS_MBPP = ('\n"""', "\nassert")
"""Where a completion ends: EvalPlus's for models without a chat template."""
COUNTS = (1, 10, 100)


@dataclass(frozen=True)
class Problem:
    """`prompt` is what the model is given, `tests` what is run behind the prompt's code and the completion."""

    name: str
    prompt: str
    head: str
    """What of the prompt belongs to the program."""
    tests: str
    stops: tuple[str, ...]

    def program(self, completion: str) -> str:
        return f"{self.head}{completion}\n{self.tests}\n"


def run_code(
    name: str,
    source: str,
    options: CodeOptions,
    *,
    streams: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    as_json: bool = False,
) -> dict[str, Any]:
    """Let a model solve problems, run its solutions, and print pass@k for k = 1, 10, 100, up to the samples.

    Args:
        name: folder or hub name of a model, with or without streams.
        source: JSON lines of problems, or the hub name of a data set of them.
        options: how to sample and run.
        streams: run so many of the model's streams; by default all.
        limit: the first so many problems, for a trial.
        batch_size: completions at once.
        seed: of the sampling.
        as_json: print JSON instead of a table.

    Raises:
        InputError: `execute` is not set; no sandbox here; the harness is not installed; rows that are no problems; a
            model that cannot serve.
    """
    if not options.execute:
        raise InputError(f"code={source}: this would run programs that the model writes; add --execute to allow it")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} is not accepted; give an integer >= 1")
    if not (outcome := run_program("", seconds=options.seconds, memory_mib=options.memory_mib)).passed:
        raise InputError(f"the sandbox cannot run even an empty program: {outcome.reason}")
    problems = read_problems(source)[:limit]
    completions = _complete(name, problems, options, streams, batch_size, seed)
    outcomes = judge(problems, completions, options)
    if options.samples_out is not None:
        _write(options.samples_out, problems, completions, outcomes)
    scores = score(outcomes)
    if as_json:
        print_json(scores)
    else:
        print_table(f"{name}: {len(problems)} problems, {options.samples} samples each", scores)
    return {"scores": scores}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct, from n of which `correct` are."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def read_problems(source: str) -> list[Problem]:
    """The problems of a file.

    Raises:
        InputError: no row, or one that has neither `prompt`, `entry_point` and `test`, nor a text and a `test_list`
            with a test in it.
    """
    problems = [problem_of(row, place) for place, row in read_rows(source, split="test")]
    if not problems:
        raise InputError(f"code={source}: no problem is in it")
    return problems


def problem_of(row: Mapping[str, Any], place: str) -> Problem:
    """One row of HumanEval or MBPP, or of their EvalPlus versions."""
    name = str(row.get("task_id", place))
    if {"prompt", "entry_point", "test"} <= row.keys():
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        return Problem(name, row["prompt"], row["prompt"], tests, STOPS + STOPS_HUMANEVAL)
    if row.get("test_list") and ("text" in row or "prompt" in row):
        prompt = f'"""\n{row.get("text") or row["prompt"]}\n{row["test_list"][0]}\n"""\n'
        setup = [row.get("test_setup_code") or "", *(row.get("test_imports") or ())]
        tests = "\n".join([*setup, row.get("test") or "\n".join(row["test_list"])])
        return Problem(name, prompt, "", tests, STOPS + STOPS_MBPP)
    raise InputError(
        f"{place}: give prompt, entry_point and test (HumanEval), or text and a test_list of one or more (MBPP); "
        f"here are {', '.join(row) or '-'}"
    )


def judge(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]], options: CodeOptions
) -> list[list[Outcome]]:
    """What came of every completion: (problems, samples)."""

    def run(program: str) -> Outcome:
        return run_program(program, seconds=options.seconds, memory_mib=options.memory_mib)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = [
            [pool.submit(run, problem.program(text)) for text in texts]
            for problem, texts in zip(problems, completions, strict=True)
        ]
        return [[future.result() for future in of] for of in waiting]


def score(outcomes: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """pass@k and its 95 % bootstrap interval over problems."""
    samples = len(outcomes[0])
    correct = [sum(outcome.passed for outcome in of) for of in outcomes]
    rows = []
    for k in (k for k in COUNTS if k <= samples):
        values = np.array([pass_at_k(samples, c, k) for c in correct])
        low, high = bootstrap_of_documents(values, np.ones(len(values)))
        rows.append({"metric": f"pass@{k}", "value": float(values.mean()), "low": low, "high": high})
    return rows


def _complete(
    name: str, problems: Sequence[Problem], options: CodeOptions, streams: int | None, batch_size: int, seed: int
) -> list[list[str]]:
    """(problems, samples) of what the model writes behind each prompt."""
    adapter = harness_model(*ready_model(name, streams), batch_size)
    from lm_eval.api.instance import Instance

    if options.new_tokens >= adapter.max_length:
        raise InputError(f"new_tokens={options.new_tokens}: {name} has a context of {adapter.max_length}; give fewer")
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    requests = [
        Instance(
            "generate_until",
            {},
            (problem.prompt, sampling | {"until": list(problem.stops), "max_gen_toks": options.new_tokens}),
            number,
        )
        for problem in problems
        for number in range(options.samples)
    ]
    torch.manual_seed(seed)
    texts = adapter.generate_until(requests)
    return [texts[start : start + options.samples] for start in range(0, len(texts), options.samples)]


def _write(
    file: Path,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    outcomes: Sequence[Sequence[Outcome]],
) -> None:
    lines = [
        {"task_id": problem.name, "completion": text, "passed": outcome.passed, "result": outcome.reason}
        for problem, texts, of in zip(problems, completions, outcomes, strict=True)
        for text, outcome in zip(texts, of, strict=True)
    ]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
