"""A sweep on a local Ray gives the rows that it gives without one; what goes wrong is one line."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from parscale.errors import InputError
from parscale.experiments.cluster import ray_tasks
from parscale.experiments.runs import SCALES
from parscale.experiments.sweep import sweep
from tests.corpora import write_corpus

SMOKE = SCALES["smoke"]


def test_without_ray_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"parscale\[cluster\]"), ray_tasks("local"):
        pass


@pytest.mark.slow
def test_an_address_where_nobody_answers_is_named() -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=r"ray=127.0.0.1:1: no cluster") as error, ray_tasks("127.0.0.1:1"):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_local_ray_runs_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, and two runs that continue it and are measured against each other, in other processes, by paths that are
    relative to this one's folder."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("corpus"))
    common: dict[str, Any] = {"stage": "retrofit", "start": SMOKE.base("code")}
    control = SMOKE.run("control", "code", SMOKE.prefix(1), **common)
    streamed = SMOKE.run("P=2", "code", SMOKE.prefix(2), control=control, **common)
    options: dict[str, Any] = {"seeds": [0], "scale": "smoke", "corpora": {"code": ("corpus",)}}
    on_ray = list(sweep("baseline", [control, streamed], results=Path("r"), work=Path("w"), ray="local", **options))
    here = list(sweep("baseline", [control, streamed], results=Path("r2"), work=Path("w2"), **options))
    assert [row["name"] for row in on_ray] == ["control", "P=2"]
    for ours, theirs in zip(on_ray, here, strict=True):
        assert ours["key"] == theirs["key"]
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=1e-5)
    assert len((tmp_path / "r" / "baseline.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_error_of_a_task_is_raised_as_itself() -> None:
    pytest.importorskip("ray")
    with ray_tasks("local", workers=1) as (at_once, submit):
        assert at_once == 1
        assert submit(os.getpid).result() != os.getpid()
    with pytest.raises(InputError) as error, ray_tasks("local") as (_, submit):
        submit(_fail).result()
    assert str(error.value) == "what was wrong"


def _fail() -> None:
    raise InputError("what was wrong")
