"""Trains the runs of an experiment, each once, and appends their rows to `RESULTS/EXPERIMENT.jsonl`.

A sweep that was killed goes on: rows that are there are not run again, nor are those that another experiment of the
same results has under another name; a run that was told to stop goes on from its checkpoint in the work folder. Models
that others continue or are measured against are trained first and stay in the work folder. A row of another text under
the same name is no row of these.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from parscale.errors import InputError
from parscale.experiments.claim import Measurements
from parscale.experiments.cluster import ray_tasks
from parscale.experiments.demo import machine
from parscale.experiments.measure import measure
from parscale.experiments.runs import SCALES, Run
from parscale.experiments.shapes import source_of
from parscale.load import load_model, on_accelerator
from parscale.output import say
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText, load_text, sample
from parscale.train.faults import OutOfTime, catching_sigterm
from parscale.train.folder import TrainResult, finished_run
from parscale.train.prepare import FORGETTING
from parscale.train.sft import load_chats
from parscale.train.trainer import train

Corpora = Mapping[str, tuple[str, ...]]
FIXED: dict[str, Any] = {"weight_decay": 0.1, "schedule": "wsd", "warmup": 0.05, "gradient_clip": 1.0}
"""Of every run. They are not in a row's key, so they must not follow the defaults of training."""


@dataclass(frozen=True)
class Task:
    """One run with its seed, and where its text and models are: all that a worker has to know."""

    run: Run
    seed: int
    scale: str
    corpora: Corpora
    work: Path
    recorded: bool
    """Whether its row is wanted, or its model alone."""

    @property
    def key(self) -> str:
        return self.run.key(self.seed, self.scale)

    @property
    def folder(self) -> Path:
        return self.work / "models" / self.key

    def needs(self) -> list["Task"]:
        """The runs whose models this one reads."""
        needed = (self.run.start, self.run.control)
        return [replace(self, run=run, recorded=False) for run in needed if run is not None]


def sweep(
    experiment: str,
    runs: Sequence[Run],
    *,
    seeds: Sequence[int],
    scale: str,
    corpora: Corpora,
    results: Path,
    work: Path,
    workers: int | None = None,
    ray: str | None = None,
    deadline: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Train what is not there yet. Yields each new row once it is on disk.

    Args:
        experiment: names the file of the rows.
        runs: what to train.
        seeds: each run is trained once with each.
        scale: which of SCALES; part of a row's key.
        corpora: sources of the texts that the runs name.
        results: folder of the rows.
        work: folder of models.
        workers: processes at once; by default one a GPU, or one.
        ray: address of a Ray cluster whose nodes run them (`cluster.ray_tasks`); by default this machine does.
        deadline: in seconds of `time.time()`. No run is begun behind it, and those under way are saved and stopped: the
            next sweep goes on with them.

    Raises:
        InputError: a text that no corpus is given for, or that cannot be read.
    """
    file = results / f"{experiment}.jsonl"
    held: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for other in sorted(results.glob("*.jsonl")):
        for row in read_rows(other):
            held.setdefault(row["key"], []).append((other, row))
    wanted = [Task(run, seed, scale, dict(corpora), work, True) for seed in seeds for run in runs]
    pending, fingerprints = dict[str, Task](), dict[Any, str]()
    for task in wanted:
        there = {of: row for of, row in held.get(task.key, ()) if _is_of_text(row, task, fingerprints)}
        if not there:
            pending[task.key] = task
        elif file not in there:
            _append(file, row := next(iter(there.values())) | {"experiment": experiment, "name": task.run.name})
            yield row
    _check_corpora(pending.values())
    tasks = _with_needed(pending)
    kept = {need.key for task in tasks for need in task.needs()}
    stopped = False
    for depth in sorted({task.run.depth for task in tasks}):
        level = [task for task in tasks if task.run.depth == depth and not stopped]
        for task, row in _perform_all(level, workers, ray, deadline):
            if row is None:  # what needs its model would not find it, whatever a clock says
                stopped = True
                continue
            if task.recorded:
                row = {"experiment": experiment} | row
                _append(file, row)
                yield row
            if task.key not in kept:
                shutil.rmtree(task.folder, ignore_errors=True)


def measure_once(
    experiment: str, measurements: Measurements, *, scale: str, results: Path, deadline: float | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of measurements that are not there yet, each yielded once it is on disk; none is begun behind the
    deadline."""
    file = results / f"{experiment}.jsonl"
    done = {row["key"] for row in read_rows(file)}
    for key, get in measurements:
        if key not in done and not _late(deadline):
            rows = [{"experiment": experiment, "key": key, "scale": scale} | row for row in get()]
            _append(file, *rows)
            yield from rows


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut short by a kill is none."""
    held = file.read_bytes() if file.is_file() else b""
    try:
        rows = [json.loads(line) for line in held[: _whole(held)].splitlines()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: a line of it is not JSON ({error})") from None
    if not all(isinstance(row, dict) and {"key", "scale"} <= row.keys() for row in rows):
        raise InputError(f"{file}: a line of it is no row of an experiment")
    return rows


def perform(task: Task, deadline: float | None = None) -> dict[str, Any] | None:
    """Train one run and look at its model: its row, or None if it was stopped at the deadline."""
    try:
        return _perform(task, deadline)
    except OutOfTime as told:
        say(f"{task.run.name} {task.run.corpus} {task.seed}: {told}; the same command goes on")
        return None


def _perform(task: Task, deadline: float | None) -> dict[str, Any]:
    run = task.run
    text = _text_of(task)
    start = task.needs()[0].folder if run.start is not None else None
    result = _finished(task, text) or train(
        TrainConfig(
            run.stage,
            task.folder,
            str(start) if start is not None else source_of(run.model, len(text.tokenizer), task.work),
            run.streams,
            balance=run.balance,
            data=task.corpora[run.corpus],
            tokens=run.tokens,
            batch_size=run.batch_size,
            block_size=run.block_size,
            learning_rate=run.learning_rate,
            stream_learning_rate=run.stream_learning_rate,
            head_rate=run.head_rate,
            decay=run.decay,
            **FIXED,
            evaluations=SCALES[task.scale].evaluations,
            validation_blocks=SCALES[task.scale].validation_blocks,
            seed=task.seed,
            resume=True,
        ),
        data=text,
        title=f"{run.name} {run.corpus} {task.seed}",
        deadline=deadline,
    )
    return _row(task, result, text) if task.recorded else {}


def _finished(task: Task, text: PackedText) -> TrainResult | None:
    """What the run gave, if it has ended. Its key tells all that it is but the text behind the name, which may have
    moved, and may have changed."""
    record = finished_run(task.folder)
    if record is None:
        return None
    if record["run"]["text"] != text.fingerprint:
        raise InputError(
            f"work={task.work} holds a model of another text called {task.run.corpus!r}, in {task.folder}; give "
            "another work folder, or the text another name"
        )
    return TrainResult(**record["result"])


def _is_of_text(row: Mapping[str, Any], task: Task, known: dict[Any, str]) -> bool:
    """Whether a row with the task's key is of the text that the task's corpora name now, where they name one. `known`
    keeps the fingerprints of texts."""
    run = task.run
    if "fingerprint" not in row or not {run.corpus, run.root.corpus} <= task.corpora.keys():
        return True
    text = run.corpus, run.root.corpus, run.vocab_size, run.block_size, run.stage == "sft"
    if text not in known:
        known[text] = _text_of(task).fingerprint
    return row["fingerprint"] == known[text]


def _row(task: Task, result: TrainResult, text: PackedText) -> dict[str, Any]:
    run = task.run
    model = on_accelerator(load_model(task.folder))
    control = on_accelerator(load_model(task.needs()[-1].folder)) if run.control is not None else None
    ids = sample(text.validation, SCALES[task.scale].validation_blocks // 4)
    return {
        "name": run.name,
        "seed": task.seed,
        "scale": task.scale,
        "corpus": run.corpus,
        "streams": run.streams.streams,
        "key": task.key,
        "run": run.describe(),
        "fingerprint": text.fingerprint,
        "overlap": text.overlap,
        "tokens": result.tokens,
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "start_loss": result.start_loss,
        "validation_loss": result.validation_loss,
        "corpora": result.corpora,
        "params": result.parameters - model.get_input_embeddings().weight.numel(),
        "stream_parameters": result.stream_parameters,
        "curve": [[entry["step"], round(entry["eval_loss"], 5)] for entry in result.history if "eval_loss" in entry],
        "measured": measure(model, ids, control=control),
        "seconds": round(result.seconds, 1),
        "machine": machine(),
    }


def _text_of(task: Task) -> PackedText:
    run, root = task.run, task.run.root
    cap = SCALES[task.scale].text_tokens
    first = _text(task.corpora[root.corpus], run.vocab_size, run.block_size, cap)
    if run.stage == "sft":
        data = task.corpora[run.corpus]
        chats = TrainConfig("sft", Path(), data=data, block_size=run.block_size, chat_template="plain")
        return load_chats(chats, first.tokenizer, leave_out_long=True)
    of = {root.corpus: first}
    for name in {run.corpus, run.forgetting} - {root.corpus, ""}:
        of[name] = load_text(
            task.corpora[name], tokenizer=first.tokenizer, block_size=run.block_size, max_train_tokens=cap
        )
    if not run.forgetting:
        return of[run.corpus]
    return replace(of[run.corpus], corpora={FORGETTING: of[run.forgetting].validation})


@lru_cache(maxsize=8)
def _text(source: tuple[str, ...], vocab_size: int, block_size: int, cap: int) -> PackedText:
    return load_text(list(source), vocab_size=vocab_size, block_size=block_size, max_train_tokens=cap)


def _check_corpora(tasks: Any) -> None:
    for task in tasks:
        for name in {task.run.corpus, task.run.root.corpus, task.run.forgetting} - {""}:
            if name not in task.corpora:
                raise InputError(f"corpus {name!r} of the run {task.run.name!r} is not given; add --corpus {name}=PATH")


def _with_needed(pending: Mapping[str, Task]) -> list[Task]:
    """The tasks, and those whose models they need."""
    found = dict(pending)
    queue = list(found.values())
    while queue:
        for need in queue.pop().needs():
            if need.key not in found:
                found[need.key] = need
                queue.append(need)
    return list(found.values())


def _perform_all(
    tasks: Sequence[Task], workers: int | None, ray: str | None, deadline: float | None
) -> Iterator[tuple[Task, dict[str, Any] | None]]:
    """Tasks that need nothing of each other, several at once, until the deadline."""
    devices = torch.cuda.device_count()
    count = min(workers or max(1, devices), len(tasks))
    if not tasks:
        return
    if ray is None and count <= 1 and devices <= 1:
        for task in tasks:
            if _late(deadline):
                return
            yield task, perform(task, deadline)
        return
    for task in {(task.run.corpus, task.run.root.corpus, task.run.stage): task for task in tasks}.values():
        _text_of(task)  # so that the workers find its tokens in the cache, and do not all make them
    with _processes(count, devices) if ray is None else ray_tasks(ray, workers) as (at_once, submit):
        queue, running = list(tasks), dict[Future, Task]()
        while queue or running:
            while queue and len(running) < at_once and not _late(deadline):
                task = queue.pop(0)
                running[submit(perform, task, deadline)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


@contextmanager
def _processes(count: int, devices: int) -> Iterator[tuple[int, Callable[..., Future]]]:
    """As `ray_tasks`, in processes of this machine."""
    context = get_context("spawn")
    numbers = context.Queue()
    for number in range(count):
        numbers.put(number)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker, initargs=(numbers, devices))
    with catching_sigterm(_end_together), pool:
        yield count, pool.submit


def _end_together() -> None:
    """Tell the workers too: each saves the run under way and ends, and none is left behind."""
    for worker in active_children():
        worker.terminate()
    raise SystemExit(0)


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.time() > deadline


def _begin_worker(numbers: Any, devices: int) -> None:
    """Each worker sees one GPU: with more, the Trainer would spread one run over all."""
    number = numbers.get()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % devices)
    torch.set_num_threads(1)


def _whole(held: bytes) -> int:
    """How many bytes of a file are whole rows: a row may lack its line end, as an editor leaves it, but not its own."""
    complete = held.rfind(b"\n") + 1
    try:
        json.loads(held[complete:])
    except ValueError:
        return complete
    return len(held)


def _append(file: Path, *rows: Mapping[str, Any]) -> None:
    """Add a line each; what a kill left of a line before is cut off first, and one that lacks its end alone gets it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # until it is closed: another sweep may append to it
        out.seek(0)
        held = out.read()
        whole = _whole(held)
        if whole != len(held):
            out.truncate(whole)
        elif held and not held.endswith(b"\n"):
            out.write(b"\n")
        out.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        out.flush()
        os.fsync(out.fileno())
