"""`parscale experiment`: runs claims at a scale, tells each row as it comes, and the verdict at the end."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from parscale.errors import InputError
from parscale.experiments.catalogue import CLAIMS, claim_named
from parscale.experiments.claim import Claim
from parscale.experiments.runs import SCALES, ScaleName
from parscale.experiments.shapes import gpu_hours
from parscale.experiments.sweep import Corpora, measure_once, read_rows, sweep
from parscale.experiments.verdicts import NOT_RUN, Verdict
from parscale.output import print_table
from parscale.train.corpus import STDLIB, check_there

ALL = "all"


def run_experiments(
    names: Sequence[str],
    *,
    scale: ScaleName = "smoke",
    corpus: Sequence[str] = (STDLIB,),
    chats: Sequence[str] = (),
    seeds: int | None = None,
    results: Path = Path("results"),
    work: Path = Path("runs/experiments"),
    workers: int | None = None,
    ray: str | None = None,
    minutes: float | None = None,
) -> dict[str, Verdict]:
    """Run experiments, print their rows and verdicts. Returns the verdicts by name.

    Args:
        names: of CLAIMS, or "all".
        scale: smoke, cpu, gpu; paper prints what would be run, and runs nothing.
        corpus: texts, each PATH or NAME=PATH; paths of one name are one text.
        chats: instructions with answers for sft, named as texts are: JSON lines of prompt and completion, or messages.
        seeds: how many, from 0; by default 3, and 1 at the scale smoke.
        results: folder of the rows, one file an experiment.
        work: folder of models and checkpoints.
        workers: processes at once; by default one a GPU, or one.
        ray: address of a Ray cluster that runs them, `auto` or `local`; by default this machine does.
        minutes: stop after so many, of all experiments together; the next call goes on where they stopped.

    Raises:
        InputError: no such experiment, too few texts, or bad text.
    """
    chosen = list(CLAIMS.values()) if list(names) == [ALL] else [claim_named(name) for name in names]
    if not chosen:
        raise InputError(f"names is empty: give one or more of {', '.join(CLAIMS)}, or {ALL}")
    texts, talks = parse_corpora(corpus), parse_corpora(chats)
    if both := texts.keys() & talks.keys():
        raise InputError(f"chats={min(both)} has the name of a text; give --chats NAME=PATH with another name")
    count = seeds if seeds is not None else 1 if scale == "smoke" else 3
    if count < 1:
        raise InputError(f"seeds={count} is not accepted; give an integer >= 1")
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes={minutes} is not accepted; give a number above 0")
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} is not accepted; give an integer >= 1")
    for source in (*texts.values(), *talks.values()) if scale != "paper" else ():
        check_there(source)
    deadline = None if minutes is None else time.time() + 60 * minutes
    machines = {"work": work, "workers": workers, "ray": ray}
    verdicts = {}
    for claim in chosen:
        if scale == "paper":
            _print_planned(claim)
            continue
        if lack := _lack(claim, texts, talks):
            if list(names) != [ALL]:
                raise InputError(f"{claim.name} needs {lack}")
            Console().print(f"{claim.name}: not run, for it needs {lack}", highlight=False, markup=False)
            continue
        corpora = {**{name: texts[name] for name in list(texts)[:1]}, **talks} if claim.chats else texts
        verdicts[claim.name] = _run(claim, scale, corpora, range(count), results, deadline, machines)
    return verdicts


def parse_corpora(given: Sequence[str]) -> Corpora:
    """Name → sources, of `PATH` (its stem is the name) and `NAME=PATH`."""
    corpora: dict[str, tuple[str, ...]] = {}
    for one in given:
        name, _, path = one.rpartition("=")
        name = name or Path(path).name.split(".")[0]
        corpora[name] = (*corpora.get(name, ()), path)
    return corpora


def verdict_of(claim: Claim, rows: Sequence[dict[str, Any]], scale: str) -> Verdict:
    """What the rows of one scale say, in the order of the claim's runs: several workers write them in any."""
    of_scale = judged(claim, _texts_apart([row for row in rows if row["scale"] == scale]), scale)
    return claim.verdict(of_scale) if of_scale else NOT_RUN


def judged(claim: Claim, rows: Sequence[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """The rows in the order of the claim's runs, each with its run under `of`. Rows of runs that it no longer has are
    left out; what is measured, not trained, has no run."""
    if claim.measurements is not None:
        return list(rows)
    runs = {run.name: run for run in claim.runs(SCALES[scale], ["first", "second"])}
    place = {name: number for number, name in enumerate(runs)}
    found = [row | {"of": runs[row["name"]]} for row in rows if row["name"] in runs]
    return sorted(found, key=lambda row: (place[row["name"]], row.get("seed", 0)))


def _texts_apart(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the fingerprint behind the name of a text that has several: `stdlib` is another text on another
    Python, and losses on two texts have no difference to tell."""
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row.get("corpus", ""), set()).add(row.get("fingerprint", "unknown"))
    return [
        row | {"corpus": f"{row['corpus']} ({row.get('fingerprint', 'unknown')[:8]})"}
        if len(texts[row.get("corpus", "")]) > 1
        else row
        for row in rows
    ]


def outcome_told(verdict: Verdict, scale: str) -> str:
    """The verdict in words, with its parts where they differ: a few steps decide nothing, whatever the numbers."""
    if scale == "smoke" and verdict.outcome != "not run":
        return "machinery only"
    return f"{verdict.outcome} ({verdict.told_parts})" if verdict.told_parts else verdict.outcome


def planned(claim: Claim) -> list[dict[str, Any]]:
    """The runs of the paper's scale and the models that they continue, each once, with the hours of one H100 that it
    needs (`shapes.gpu_hours`)."""
    runs = claim.runs(SCALES["paper"], claim.paper_texts)
    needed = {run.start.key(0, ""): run.start for run in runs if run.start is not None}
    return [
        {
            "run": run.name,
            "text": run.corpus,
            "model": run.model,
            "P": run.streams.streams,
            "tokens": f"{run.tokens / 1e9:,.1f} B",
            "H100 hours": round(gpu_hours(run)),
        }
        for run in [*needed.values(), *runs]
    ]


def _print_planned(claim: Claim) -> None:
    plan = planned(claim)
    hours = f"{sum(row['H100 hours'] for row in plan):,} hours of one H100 in all"
    print_table(f"{claim.name}: not run; {hours}", plan)
    if not plan:
        print(f"{claim.name}: no runs at the paper's scale\n")


def _lack(claim: Claim, texts: Corpora, chats: Corpora) -> str:
    """What was not given that the claim needs; "" if nothing."""
    if len(texts) < claim.corpora:
        return f"{claim.corpora} texts: --corpus HOME=PATH OTHER=PATH"
    return "instructions with answers: --chats NAME=PATH" if claim.chats and not chats else ""


def _run(
    claim: Claim,
    scale: ScaleName,
    corpora: Corpora,
    seeds: Sequence[int],
    results: Path,
    deadline: float | None,
    machines: Mapping[str, Any],
) -> Verdict:
    console = Console()
    if claim.measurements is not None:
        measured = claim.measurements(SCALES[scale])
        found = measure_once(claim.name, measured, scale=scale, results=results, deadline=deadline)
        total = None
    else:
        runs = claim.runs(SCALES[scale], list(corpora))
        there = {row["key"] for row in read_rows(results / f"{claim.name}.jsonl")}
        total = sum(run.key(seed, scale) not in there for run in runs for seed in seeds)
        told: Any = {"seeds": seeds, "scale": scale, "corpora": corpora, "results": results, "deadline": deadline}
        found = sweep(claim.name, runs, **told, **machines)
    for count, row in enumerate(found, 1):
        told = f"loss {row['validation_loss']:.4f}, {row['seconds']:.0f} s" if "validation_loss" in row else ""
        of = "" if total is None else f" of {total}"
        seed = f" seed {row['seed']}" if "seed" in row else ""
        console.print(f"{claim.name} {count}{of}: {row['name']}{seed} {told}", highlight=False, markup=False)
    verdict = verdict_of(claim, read_rows(results / f"{claim.name}.jsonl"), scale)
    print_table(claim.sentence, verdict.table)
    told = f"{claim.name}, {scale}: {outcome_told(verdict, scale)}. {verdict.reason}"
    console.print(told, highlight=False, markup=False)
    return verdict
