"""A sweep trains each run once, whatever stops it, and gives the same text and base to all that are compared."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.experiments import sweep as sweeping
from parscale.experiments.catalogue import CLAIMS
from parscale.experiments.experiment import parse_corpora, planned, verdict_of
from parscale.experiments.runs import SCALES, Run
from parscale.experiments.shapes import configuration, gpu_hours
from parscale.experiments.sweep import Task, read_rows, sweep
from parscale.train import faults
from parscale.train.config import Balance
from tests.corpora import write_corpus

SMOKE = SCALES["smoke"]
CONTROL = SMOKE.run("control", "code", SMOKE.prefix(1))
STREAMED = replace(SMOKE.run("P=2", "code", SMOKE.prefix(2)), control=CONTROL)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Tasks that were performed, in order; nothing is trained."""
    done: list[Task] = []

    def perform(task: Task, deadline: float | None) -> dict[str, Any]:
        for need in task.needs():
            assert (need.folder / "train.json").exists()
        if not task.folder.exists():
            done.append(task)
            task.folder.mkdir(parents=True)
            (task.folder / "train.json").write_text("{}")
        return {"key": task.key, "name": task.run.name, "seed": task.seed, "scale": task.scale}

    monkeypatch.setattr(sweeping, "perform", perform)
    return done


def run(folder: Path, runs: list[Run], experiment: str = "baseline", **options: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"seeds": [0], "scale": "smoke", "corpora": {"code": ("x",)}} | options
    return list(sweep(experiment, runs, results=folder / "results", work=folder / "work", **given))


def names(tasks: list[Task]) -> list[str]:
    return [task.run.name for task in tasks]


def test_a_last_row_without_a_line_end_is_a_row(tmp_path: Path, trained: list[Task]) -> None:
    """As an editor leaves it. One that was cut short is none."""
    run(tmp_path, [CONTROL, STREAMED])
    file = tmp_path / "results" / "baseline.jsonl"
    file.write_text(file.read_text().removesuffix("\n"))
    assert [row["name"] for row in read_rows(file)] == ["control", "P=2"]
    assert [row["seed"] for row in run(tmp_path, [CONTROL], seeds=[0, 1])] == [1]
    assert [row["name"] for row in read_rows(file)] == ["control", "P=2", "control"]
    file.write_text(file.read_text() + '{"key": "cut')
    assert len(read_rows(file)) == 3


def test_finished_rows_are_not_run_again(tmp_path: Path, trained: list[Task]) -> None:
    assert len(run(tmp_path, [CONTROL, STREAMED])) == 2
    assert run(tmp_path, [CONTROL, STREAMED]) == []
    assert [row["seed"] for row in run(tmp_path, [CONTROL, STREAMED], seeds=[0, 1])] == [1, 1]
    assert names(trained) == ["control", "P=2"] * 2


def test_a_row_of_another_experiment_is_taken_over_under_its_own_name(tmp_path: Path, trained: list[Task]) -> None:
    run(tmp_path, [CONTROL])
    (row,) = run(tmp_path, [replace(CONTROL, name="one stream")], "dynamic")
    assert (row["experiment"], row["name"]) == ("dynamic", "one stream")
    assert len(trained) == 1


def test_a_line_that_a_kill_cut_short_is_no_row(tmp_path: Path, trained: list[Task]) -> None:
    run(tmp_path, [CONTROL])
    file = tmp_path / "results" / "baseline.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "cut sho')
    assert len(read_rows(file)) == 1
    run(tmp_path, [CONTROL, STREAMED])
    assert [row["name"] for row in map(json.loads, file.read_text().splitlines())] == ["control", "P=2"]
    file.write_bytes(b"no json\n" + whole)
    with pytest.raises(InputError, match="not JSON"):
        read_rows(file)


def test_models_that_others_need_come_first_and_stay(tmp_path: Path, trained: list[Task]) -> None:
    base = SMOKE.base("code")
    control = replace(CONTROL, stage="retrofit", start=base)
    streamed = replace(STREAMED, stage="retrofit", start=base, control=control)
    rows = run(tmp_path, [streamed, control])
    assert names(trained) == ["base", "control", "P=2"]
    assert [row["name"] for row in rows] == ["control", "P=2"]  # the base is no row
    kept = {task.run.name for task in trained if task.folder.exists()}
    assert kept == {"base", "control"}


def test_workers_give_each_row_to_its_own_task(
    tmp_path: Path, trained: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is only needed is no row, and stays; that of a row goes when nothing needs it."""

    @contextmanager
    def threads(count: int, devices: int) -> Iterator[tuple[int, Any]]:
        with ThreadPoolExecutor(count) as pool:
            yield count, pool.submit

    monkeypatch.setattr(sweeping, "_processes", threads)
    monkeypatch.setattr(sweeping, "_text_of", lambda task: None)
    alone = [replace(CONTROL, name=f"alone {i}", learning_rate=0.1 * i) for i in (1, 2, 3)]
    rows = run(tmp_path, [alone[0], STREAMED, *alone[1:]], workers=2)
    assert sorted(row["name"] for row in rows) == ["P=2", "alone 1", "alone 2", "alone 3"]
    assert {task.run.name for task in trained if task.folder.exists()} == {"control"}


def test_a_needed_model_that_is_gone_is_trained_again_but_is_no_new_row(tmp_path: Path, trained: list[Task]) -> None:
    run(tmp_path, [CONTROL])  # nothing needs it here, so it does not stay
    rows = run(tmp_path, [CONTROL, STREAMED])
    assert names(trained) == ["control", "control", "P=2"]
    assert [row["name"] for row in rows] == ["P=2"]


def test_another_text_under_the_same_name_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows stand beside the others, and no gain is measured against a model of the other text."""
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    corpus = write_corpus(tmp_path / "corpus")
    given: dict[str, Any] = {"corpora": {"code": (str(corpus),)}}
    (first,) = run(tmp_path, [CONTROL], **given)
    assert run(tmp_path, [CONTROL], **given) == []
    corpus.rename(tmp_path / "moved")
    given = {"corpora": {"code": (str(tmp_path / "moved"),)}}
    assert run(tmp_path, [CONTROL], **given) == []
    (streamed,) = run(tmp_path, [STREAMED], **given)  # its control stays in the work folder
    assert streamed["fingerprint"] == first["fingerprint"]
    (tmp_path / "moved").rename(tmp_path / "changed")
    (tmp_path / "changed" / "more.py").write_text("def another(text):\n    return text\n" * 99)
    given = {"corpora": {"code": (str(tmp_path / "changed"),)}}
    with pytest.raises(InputError, match="a model of another text called 'code'"):
        run(tmp_path, [STREAMED], **given)
    (tmp_path / "work").rename(tmp_path / "old work")
    (second,) = run(tmp_path, [CONTROL], **given)
    assert (second["key"], second["fingerprint"] == first["fingerprint"]) == (first["key"], False)
    assert len(read_rows(tmp_path / "results" / "baseline.jsonl")) == 3


def test_after_the_deadline_nothing_is_begun(tmp_path: Path, trained: list[Task]) -> None:
    assert run(tmp_path, [CONTROL, STREAMED], deadline=0.0) == []
    assert trained == []


def test_a_run_under_way_is_stopped_at_the_deadline_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs its model does not begin, and in the end the rows are those of a sweep that was not stopped."""
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    given: dict[str, Any] = {"corpora": {"code": (str(write_corpus(tmp_path / "corpus")),)}}
    expected = run(tmp_path / "whole", [CONTROL, STREAMED], **given)
    steps = iter([0.0, 0.0, math.inf])
    with monkeypatch.context() as clock:
        clock.setattr(faults, "time", SimpleNamespace(time=lambda: next(steps), monotonic=time.monotonic))
        assert run(tmp_path, [CONTROL, STREAMED], deadline=time.time() + 3600, **given) == []
    assert "control code 0: stopped after step 3 of 6" in capsys.readouterr().err
    rows = run(tmp_path, [CONTROL, STREAMED], **given)
    assert [row["validation_loss"] for row in rows] == [row["validation_loss"] for row in expected]


def test_a_text_that_is_not_given_is_named(tmp_path: Path, trained: list[Task]) -> None:
    with pytest.raises(InputError, match="--corpus code=PATH"):
        run(tmp_path, [CONTROL], corpora={"law": ("x",)})


def test_a_key_is_all_but_the_name() -> None:
    key = CONTROL.key(0, "smoke")
    assert replace(CONTROL, name="other").key(0, "smoke") == key
    others = [
        CONTROL.key(1, "smoke"),
        CONTROL.key(0, "cpu"),
        replace(CONTROL, corpus="law").key(0, "smoke"),
        replace(CONTROL, tokens=512).key(0, "smoke"),
        replace(CONTROL, streams=StreamsConfig(1, 8, smoothing=0.2)).key(0, "smoke"),
        replace(CONTROL, balance=Balance(load_balance=0.1)).key(0, "smoke"),
        replace(CONTROL, start=SMOKE.base("code")).key(0, "smoke"),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_corpora_by_name() -> None:
    given = ["a/prose.train.jsonl.zst", "code=b/x.py", "code=c"]
    assert parse_corpora(given) == {"prose": ("a/prose.train.jsonl.zst",), "code": ("b/x.py", "c")}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
def test_the_runs_of_a_claim_are_distinct_and_can_be_ordered(name: str, scale: str) -> None:
    runs = CLAIMS[name].runs(SCALES[scale], ["code", "prose"])
    assert len({run.key(0, scale) for run in runs}) == len(runs)
    assert len({(run.corpus, run.name) for run in runs}) == len(runs)
    for run in runs:
        assert run.tokens >= run.batch_size * run.block_size
        if run.streams.streams > 1 and run.stage != "sft":
            assert run.control is not None
            assert run.control.tokens >= run.tokens  # the same, or, at equal compute, more


def test_hours_of_the_paper_s_scale() -> None:
    """The 1.6 B model with 8 streams on 42 B tokens: 6·1,595,669,000·8·42e9 / (989e12·0.4·3600) hours."""
    run = SCALES["paper"].run("P=8", "code", StreamsConfig(8))
    assert gpu_hours(run) == pytest.approx(6 * 1_595_669_000 * 8 * 42e9 / (989e12 * 0.4 * 3600), rel=1e-4)
    assert {line["P"] for line in planned(CLAIMS["law"])} == {1, 2, 4, 8}
    prefix = planned(CLAIMS["prefix"])  # all continue one model of a trillion tokens, which is counted once
    assert [line["tokens"] for line in prefix if line["run"] == "base"] == ["1,000.0 B"]


def test_a_sparse_shape_has_the_active_width_of_the_dense_one() -> None:
    dense, sparse = configuration("2x32x2", 300), configuration("2x32x2e8", 300)
    assert sparse["moe_intermediate_size"] * sparse["num_experts_per_tok"] == dense["intermediate_size"]
    with pytest.raises(InputError, match="LAYERSxHIDDENxHEADS"):
        configuration("giant", 300)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    """Killed without warning once the first row is there; its rows stay, and each run is in the file once."""
    corpus = write_corpus(tmp_path / "corpus")
    command = [sys.executable, "-m", "parscale", "experiment", "baseline", "--corpus", f"code={corpus}"]
    environment = os.environ | {"PARSCALE_CACHE": str(tmp_path / "cache")}
    file = tmp_path / "results" / "baseline.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (file.exists() and file.read_text().count("\n")):
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    before = read_rows(file)
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = read_rows(file)
    assert after[: len(before)] == before
    assert len(after) == len({row["key"] for row in after}) == len(CLAIMS["baseline"].runs(SMOKE, ["code"]))
    streamed = [row for row in after if row["streams"] > 1]
    assert all(row["measured"]["rho"] is not None for row in streamed)
    assert len({row["fingerprint"] for row in after}) == 1
    assert len({row["tokens"] for row in after}) == 1


@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop_saves_and_leaves_no_worker_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parscale", "experiment", "baseline", "--scale", "cpu", "--workers", "2"]
    command += ["--seeds", "1", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while b" 0/2400 val" not in (line := process.stdout.readline()):
            assert line, "it ended"
        process.terminate()
        process.communicate(timeout=180)  # returns once all who hold the pipe are gone, the workers too
    assert process.returncode == 0
    assert list(tmp_path.glob("work/models/*/checkpoint-*"))


@pytest.mark.slow
def test_workers_share_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 2 on another text than the base's, in two processes: the base first, its tokenizer for all."""
    corpus = write_corpus(tmp_path / "corpus")
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    runs = [run for run in CLAIMS["domains"].runs(SMOKE, ["code", "other"]) if run.name != "P=4, prefix"]
    corpora = {"code": (str(corpus),), "other": (str(Path(__file__).parents[1]),)}
    rows = run(tmp_path, runs, "domains", corpora=corpora, workers=2)
    added = {row["name"]: row["stream_parameters"] for row in rows}
    assert added.keys() == {"control", "P=4, prefix+lora", "LoRA"}
    assert added["LoRA"] == pytest.approx(added["P=4, prefix+lora"], rel=0.05)
    assert all(row["corpora"]["forgetting"]["before"] > 0 for row in rows)
    assert verdict_of(CLAIMS["domains"], rows, "smoke").outcome in ("undecided", "not run")


def test_the_documents_name_every_experiment_and_count_its_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| `")}
    for name, claim in CLAIMS.items():
        texts = ["code", "other"] if claim.corpora == 2 or claim.chats else ["code"]
        assert lines[name] == str(len(claim.runs(SCALES["cpu"], texts)) or "")
    verb = (Path(sweeping.__file__).with_name("verbs.py")).read_text(encoding="utf-8")
    assert all(name in verb for name in CLAIMS)
