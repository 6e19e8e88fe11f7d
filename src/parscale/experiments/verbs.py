"""The verbs of the command line that measure: experiment, report, eval and pilot. Imports stand inside them."""

from inspect import signature
from pathlib import Path
from typing import Annotated, Literal

import tyro

from parscale.errors import InputError
from parscale.evaluate.code_options import CodeOptions


def experiment(
    names: Annotated[tuple[str, ...], tyro.conf.Positional],
    scale: Literal["smoke", "cpu", "gpu", "paper"] = "smoke",
    corpus: tuple[str, ...] = ("stdlib",),
    chats: tuple[str, ...] = (),
    seeds: int | None = None,
    results: Path = Path("results"),
    work: Path = Path("runs/experiments"),
    workers: int | None = None,
    ray: str | None = None,
    minutes: float | None = None,
) -> None:
    """Test claims about streams: train what is not there yet, tell rows and a verdict. docs/experiments.md

    Args:
        names: baseline, aggregation, efficiency, law, many-streams, data, split, moe, smoothing, domains, prefix,
            dynamic, sft, theory, sharing, balance, diversifiers, rates, lora, together; several, or all.
        scale: smoke (proves the machinery), cpu, gpu; paper lists what the paper's sizes would take, and runs nothing.
        corpus: texts, as PATH or NAME=PATH; paths of one name are one text.
        chats: for sft, instructions with answers: JSON lines of prompt and completion, or messages; NAME=PATH.
        seeds: how many; by default 3, and 1 for smoke.
        results: folder of the rows, one file of JSON lines an experiment. Rows that are there are not run again.
        work: folder of models and checkpoints.
        workers: processes at once; by default one a GPU, or one.
        ray: run them on a Ray cluster: host:port, auto, or local. All nodes must see the same work folder and texts.
        minutes: stop after so many, of all experiments together; runs under way are saved. Call again to go on.
    """
    from parscale.experiments.experiment import run_experiments

    options = {"results": results, "work": work, "workers": workers, "ray": ray, "minutes": minutes}
    run_experiments(names, scale=scale, corpus=corpus, chats=chats, seeds=seeds, **options)


def report(results: Annotated[Path, tyro.conf.Positional] = Path("results"), out: Path | None = None) -> None:
    """One page of all experiments: verdicts, tables, plots, and what was not run.

    Args:
        results: folder of the rows.
        out: the page; by default report.html in that folder.
    """
    from parscale.experiments.results import write_report

    print(write_report(results, out))


def evaluate(
    model: Annotated[str, tyro.conf.Positional],
    data: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    code: str | None = None,
    streams: int | None = None,
    block_size: int = 256,
    tokens: int = 200_000,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    options: Annotated[CodeOptions, tyro.conf.arg(name="")] = CodeOptions(),  # noqa: B008 (frozen)
    json: bool = False,
) -> None:
    """How good is a model? Perplexity of texts, or benchmarks, or code that passes its tests. docs/eval.md

    Args:
        model: a folder or a hub name, with or without streams.
        data: texts: loss, perplexity and bits per byte of each, with an interval over documents. By default
            this Python's own standard library.
        tasks: benchmarks of lm-evaluation-harness, by name, or YAML files of your own. Instead of data.
        code: JSON lines of problems as HumanEval or MBPP has them: pass@k. Instead of data; needs --execute.
        streams: run so many of the model's streams; by default all.
        block_size: of data: longer documents are read in pieces of so many tokens.
        tokens: of each text at most.
        shots: examples before each question of a task; by default what the task says.
        limit: questions of each task, or problems, at most, for a trial.
        batch_size: questions or completions at once.
        options: how code is sampled and run (its fields are flags of their own).
        json: print JSON instead of a table.
    """
    if sum(map(bool, (data, tasks, code))) > 1:
        raise InputError("data, tasks and code are three evaluations: give one of them")
    kind = "tasks" if tasks else "code" if code else "data"
    given: dict[str, object] = {"block_size": block_size, "tokens": tokens, "shots": shots, "limit": limit}
    given |= {"batch_size": batch_size, "options": options}
    for name, kinds in _FLAGS_OF.items():
        if kind not in kinds and given[name] != signature(evaluate).parameters[name].default:
            flag = "a flag of code (execute, samples, …)" if name == "options" else f"{name}={given[name]}"
            raise InputError(f"{flag} says nothing of an evaluation with {kind}; it is of {' and '.join(kinds)}")
    if tasks:
        from parscale.evaluate.harness import run_tasks

        run_tasks(model, tasks, streams=streams, shots=shots, limit=limit, batch_size=batch_size, as_json=json)
    elif code:
        from parscale.evaluate.code import run_code

        run_code(model, code, options, streams=streams, limit=limit, batch_size=batch_size, as_json=json)
    else:
        from parscale.evaluate.perplexity import evaluate as run

        run(model, data or ("stdlib",), streams=streams, block_size=block_size, tokens=tokens, as_json=json)


_FLAGS_OF = {
    "block_size": ("data",),
    "tokens": ("data",),
    "shots": ("tasks",),
    "limit": ("tasks", "code"),
    "batch_size": ("tasks", "code"),
    "options": ("code",),
}
"""Which evaluations a flag of `evaluate` is for."""


def pilot(
    model: Annotated[str, tyro.conf.Positional],
    data: tuple[str, ...],
    minutes: float = 20.0,
    out: Path = Path("pilot-out"),
    block_size: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Should I use streams? Short runs on a frozen model and your text, the gain, its cost, and a plain verdict.

    Args:
        model: a folder or a hub name of a model without streams.
        data: your text.
        minutes: to spend on training, about.
        out: folder of the runs and of pilot.json; a pilot that was stopped goes on.
        block_size: tokens in a sequence.
        batch_size: sequences a step.
        seed: of everything.
        json: print JSON instead of tables.
    """
    from parscale.experiments.pilot import run_pilot

    sizes = {"block_size": block_size, "batch_size": batch_size, "seed": seed}
    run_pilot(model, data=data, minutes=minutes, out=out, **sizes, as_json=json)
