"""What saved models, cut-off runs, training and the keys of rows gave before the code was rearranged, they give now."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import parscale
from parscale.config import StreamsConfig
from parscale.experiments.catalogue import CLAIMS
from parscale.experiments.runs import SCALES, Run
from parscale.load import load_model
from parscale.train.config import Balance
from parscale.train.trainer import train
from tests.pinned import make

ROWS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "experiments"
CASES = ["-".join(case) for case in make.CASES]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make.write_texts()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("saved", ["whole", "adapters"])
def test_saved_models_answer_as_before(case: str, saved: str) -> None:
    reference = load_file(make.HERE / "models" / "whole" / case / "reference.safetensors")
    if saved == "whole":
        model = load_model(make.HERE / "models" / "whole" / case)
    else:
        base = load_model(make.HERE / "models" / case.partition("-")[0])
        model = parscale.load_streams(base, make.HERE / "models" / "adapters" / case)
    found = make.answers(model.eval())
    torch.testing.assert_close(found["logits"], reference["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["tokens"], reference["tokens"])
    assert torch.equal(found["cache_shapes"], reference["cache_shapes"])


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(texts: None) -> None:
    shutil.copytree(make.HERE / "run", ".", dirs_exist_ok=True)
    train(make.run_of("retrofit", "run", save_every=5, keep=1, resume=True))
    _check_norms(make.told(Path("run")), json.loads(Path("resumed.json").read_text()))


def test_training_gives_the_same_weights(texts: None) -> None:
    before, found = json.loads((make.HERE / "trained.json").read_text()), make.trained()
    assert before.keys() == found.keys()
    for stage in before:
        _check_norms(found[stage], before[stage])


def _check_norms(found: dict[str, Any], before: dict[str, Any]) -> None:
    """Another processor sums in another order, which twenty steps of Adam enlarge; `make --check` compares bits."""
    assert found["norms"].keys() == before["norms"].keys()
    for name, norm in before["norms"].items():
        assert found["norms"][name] == pytest.approx(norm, rel=1e-3, abs=1e-4), name


@cache
def _rows(pattern: str) -> list[Any]:
    files = sorted(ROWS.glob(pattern))
    rows = [(file, json.loads(line)) for file in files for line in file.read_text().splitlines()]
    return [(file, row) for file, row in rows if "run" in row]


def _run(described: dict[str, Any]) -> Run:
    """The run that `Run.describe` tells of."""
    values = dict(described)
    for name in ("start", "control"):
        if name in values:
            values[name] = _run(values[name])
    for name, kind in (("streams", StreamsConfig), ("balance", Balance)):
        values[name] = kind(**values.get(name, {}))
    return Run("", **values)


def test_a_row_has_the_key_of_its_run() -> None:
    rows = _rows("**/*.jsonl")
    assert len(rows) > 1000
    for _, row in rows:
        assert _run(row["run"]).key(row["seed"], row["scale"]) == row["key"], row["name"]


@pytest.mark.parametrize("claim", sorted({file.stem for file in ROWS.glob("*.jsonl")} & set(CLAIMS)))
def test_a_claim_finds_its_rows(claim: str) -> None:
    rows = [row for file, row in _rows("*.jsonl") if file.stem == claim]
    texts = sorted({row["corpus"] for row in rows} | {_run(row["run"]).root.corpus for row in rows})
    wanted = set[str]()
    for scale in {row["scale"] for row in rows}:
        for home in texts:
            order = [home, *(text for text in texts if text != home)]
            runs = {run.key(0, scale): run for run in CLAIMS[claim].runs(SCALES[scale], order)}
            wanted |= {run.key(seed, scale) for run in runs.values() for seed in {row["seed"] for row in rows}}
    assert {row["key"] for row in rows} <= wanted
