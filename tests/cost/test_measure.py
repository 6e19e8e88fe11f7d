"""Measured costs of a tiny model: what is run is what is derived, and what cannot be measured is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parscale.cli import main
from parscale.cost import measure
from parscale.cost.hardware import hardware_of
from parscale.cost.measure import _cases, measure_table
from parscale.cost.model import Shape, Workload, cost, workloads
from parscale.errors import InputError

TINY = Shape(64, 160, layers=3, heads=4, kv_heads=2, vocab=1000)
SHORT = Workload(input=12, output=3, dtype="fp32", accounting="counted", prefix_tokens=5)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's floors as numbers: measuring them takes half a gigabyte and a second."""

    def measured(self: Any, repeats: int = 5) -> None:
        self.bandwidth, self.flops = 2e10, 3e11

    monkeypatch.setattr(measure.Floors, "measure", measured)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kv", ["own", "shared"])
def test_a_row_for_every_case_beside_the_derived_one(kv: str, tmp_path: Path) -> None:
    work = Workload(**{**vars(SHORT), "kv": kv})
    rows = measure_table(TINY, (1, 4), (1, 2), work, repeats=3, layers=2)
    assert [(r["streams"], r["batch"]) for r in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    (tmp_path / "here.json").write_text(json.dumps(rows[0]["machine"]))
    here = hardware_of(tmp_path / "here.json")
    assert (here.bandwidth, here.flops) == (2e10, 3e11)
    for row in rows:
        assert (row["layers"], row["layers_of_model"], row["repeats"]) == (2, 3, 3)
        at = {"streams": row["streams"], "batch": row["batch"], "flops_efficiency": 1.0, "bandwidth_efficiency": 1.0}
        derived = cost(Shape(64, 160, 2, 4, 2, vocab=1000), Workload(**{**vars(work), **at}), here)
        assert {name: row[name] for name in derived} == derived
        seen = row["measured"]
        for part in ("prefill", "decode_step", "request"):
            assert 0 < seen[part]["q1"] <= seen[part]["median"] <= seen[part]["q3"]
        assert seen["request"]["q3"] > seen["prefill"]["q1"] + 3 * seen["decode_step"]["q1"] - 1e-12
        assert 0 < row["floor"]["decode_step"] <= row["latency"]["decode_step"]
        assert 0 < row["floor"]["prefill"] <= row["latency"]["prefill"]


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_what_is_run_has_the_derived_parameters_cache_and_one_set_of_weights(kv: str) -> None:
    cases = _cases(TINY, workloads(Workload(**{**vars(SHORT), "kv": kv}), (1, 4), (2,)), "cpu")
    plain, streamed = (case.model for case in cases)
    assert plain.model.layers[0].mlp.up_proj.weight is streamed.model.layers[0].mlp.up_proj.weight
    for case in cases:
        derived = cost(TINY, case.work)
        named = case.model.named_parameters()
        assert derived["params"] == sum(p.numel() for name, p in named if "embed_tokens" not in name)
        with torch.no_grad():
            cache = case.model(input_ids=case.prompt, use_cache=True, logits_to_keep=1).past_key_values
        rows = 2 if kv == "shared" else 2 * case.work.streams
        assert cache.layers[0].keys.shape == (rows, 2, 12, 16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_peak_is_what_was_held_and_not_what_was_held_before() -> None:
    before = measure._settled_memory("cpu")
    held = measure._peak_gib(lambda: torch.ones(2**26), before, "cpu")
    if before is None or held is None:
        pytest.skip("this sandbox does not let a process reset its peak")
    assert held == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "int4"], "dtype 'int4' cannot be measured: random weights are made in fp32, bf16, fp16 only"),
        (["--layers", "37"], "layers is 37: this model has 36, give 1 to 36"),
        (["--layers", "0"], "layers is 0"),
        (["--repeats", "2"], "repeats is 2: medians with quartiles need at least 3"),
        (["--batch", "100000", "--in", "100000"], "GiB are free: give fewer layers"),
        (["--streams"], "streams is empty"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options: list[str], said: str, capsys: Any) -> None:
    assert main(["cost", "--measure", "--model", "0.5B", *options]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_layers_are_for_measuring(capsys: Any) -> None:
    assert main(["cost", "--layers", "2"]) == 2
    assert "layers is 2 without --measure" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"heads of size 62\.5"):
        measure_table(Shape(1000, 160), (1,), (1,), SHORT)
