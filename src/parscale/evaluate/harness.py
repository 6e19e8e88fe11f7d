"""`parscale eval --tasks`: benchmarks of lm-evaluation-harness (extra `eval`), through its own adapter of Hugging Face
models. To it a model with streams is a model like any other."""

# pyright: reportMissingImports=false

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parscale.errors import InputError, first_line
from parscale.evaluate.perplexity import ready_model
from parscale.output import print_json, print_table

MAIN_METRICS = ("acc_norm", "acc", "exact_match")
"""Of which the first that a task has goes into the average."""


def run_tasks(
    name: str,
    tasks: Sequence[str],
    *,
    streams: int | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run benchmarks and print their scores: `rows`, one for each metric of each task or group, and, of several, the
    `average` of their main metrics.

    Args:
        name: folder or hub name of a model, with or without streams.
        tasks: of the harness: names of tasks, groups or tags, or YAML files of your own.
        streams: run so many of the model's streams; by default all.
        shots: examples before each question; by default what the task says.
        limit: questions of each task at most, for a trial.
        batch_size: requests at once.
        as_json: print JSON instead of a table.

    Raises:
        InputError: the harness is not installed; no such task; a task that runs code; a model that cannot be loaded.
    """
    adapter = harness_model(*ready_model(name, streams), batch_size)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = all(Path(task).is_file() for task in tasks)  # to look through the harness's thousands takes seconds
    try:
        found: Any = simple_evaluate(
            adapter,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=TaskManager(include_defaults=not own),
            log_samples=False,
        )
    except KeyError as error:
        raise InputError(f"tasks={' '.join(tasks)}: {error.args[0]}; `lm-eval ls tasks` lists them") from None
    except ValueError as error:
        if "unsafe" in str(error):
            raise InputError(f"tasks={' '.join(tasks)}: one of them runs code; give its problems as --code") from None
        raise InputError(f"tasks={' '.join(tasks)}: {first_line(error)}") from None
    scores = tabulate(found)
    if as_json:
        print_json(scores)
    else:
        print_table(f"{name}: benchmarks", scores["rows"])
        if scores["average"] is not None:
            print(f"average of {', '.join(scores['averaged'])}: {scores['average']:.4f}")
    return scores


def harness_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's adapter of a model.

    Raises:
        InputError: the harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise InputError("tasks and code need lm-evaluation-harness: pip install 'parscale[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that it has not loaded itself
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def tabulate(found: dict[str, Any]) -> dict[str, Any]:
    """The harness's results as rows. Members of a group are left out, for the group has their mean."""
    members = {child for children in found["group_subtasks"].values() for child in children}
    rows, main = [], {}
    for task, result in found["results"].items():
        if task in members:
            continue
        scores = {key: value for key, value in result.items() if "," in key and isinstance(value, int | float)}
        values = {key: value for key, value in scores.items() if "_stderr," not in key}
        for key, value in values.items():
            metric, told = key.split(",", 1)
            rows.append(
                {
                    "task": task,
                    "metric": metric if told == "none" else f"{metric} ({told})",
                    "value": value,
                    "standard error": scores.get(f"{metric}_stderr,{told}"),
                    "shots": found["n-shot"].get(task),
                    "questions": found["n-samples"].get(task, {}).get("effective"),
                }
            )
        ranked = sorted(values, key=lambda key: [*MAIN_METRICS, key.split(",")[0]].index(key.split(",")[0]))
        if ranked:
            main[f"{task} {ranked[0].split(',')[0]}"] = values[ranked[0]]
    average = sum(main.values()) / len(main) if len(main) > 1 else None
    return {"rows": rows, "average": average, "averaged": list(main)}
