"""The planner against brute force over a grid, its advice, its budgets, and each bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

import parscale
from parscale.cli import main
from parscale.cost import formulas
from parscale.cost.hardware import HARDWARE
from parscale.cost.model import PAPER_SHAPES, Workload
from parscale.errors import InputError
from parscale.law.fit import Law, fit
from parscale.law.plan_report import draw_frontier
from parscale.law.planner import Budgets, Search, plan
from parscale.law.runs import paper
from parscale.law.units import parse_bytes, parse_seconds


@pytest.fixture(scope="module")
def stack() -> Law:
    return fit(paper("stack"))


def test_the_family_is_the_papers_six_models() -> None:
    for shape in PAPER_SHAPES.values():
        like = formulas.family(shape.hidden)
        assert formulas.backbone_params(like) == pytest.approx(shape.params(), rel=0.01)
        assert formulas.family_hidden(formulas.backbone_params(like)) == pytest.approx(shape.hidden, rel=1e-12)


@pytest.mark.parametrize(
    ("budget", "work"),
    [
        ({"memory": 6 * 2**30, "latency": 0.04}, Workload()),
        ({"memory": 24e9, "latency": 0.02}, Workload(batch=16, input=1024)),
        ({"memory": 24e9, "latency": 0.04, "train_flops": 2e21}, Workload(accounting="counted")),
    ],
)
def test_no_model_on_a_grid_that_fits_is_better(stack: Law, budget: dict, work: Workload) -> None:
    best = plan(hardware="l4", law=stack, workload=work, samples=20, **budget).best
    limits = Budgets(budget["memory"], budget["latency"], budget.get("train_flops"))
    search = Search(stack, work, HARDWARE["l4"], limits, 42e9)
    assert search.fits(best["backbone_params"], best["streams"], best["dtype"])
    low, high = search.range()
    losses = [
        search.row(n, p, dtype)["loss"]
        for n in np.geomspace(low, high, 150)
        for p in (1, 2, 4, 8)
        for dtype in ("bf16", "int8", "int4")
        if search.fits(n, p, dtype)
    ]
    assert best["loss"] <= min(losses)
    assert best["loss"] == pytest.approx(min(losses), abs=0.01)


def test_streams_win_where_memory_is_short_and_lose_where_arithmetic_is(stack: Law) -> None:
    alone = plan("6GiB", "40ms", "l4", stack, dtypes=("bf16",), samples=20)
    assert alone.best["streams"] == 8
    assert alone.dense is not None
    assert alone.dense["streams"] == 1
    assert alone.dense["loss"] > alone.best["loss"]
    assert alone.streams_win == 1
    assert "P = 1 would reach" in alone.sentence
    crowd = plan("24GB", "40ms", "l4", stack, dtypes=("bf16",), workload=Workload(batch=64, input=1024), samples=20)
    assert crowd.best["streams"] == 1
    assert crowd.equal_dense is None
    assert "P = 1 is the better answer here" in crowd.sentence


def test_the_equal_dense_model_has_the_loss_and_costs_more(stack: Law) -> None:
    result = plan("6GiB", None, "a100-80g", stack, dtypes=("bf16",), samples=20)
    dense = result.equal_dense
    assert dense is not None
    assert dense["streams"] == 1
    assert dense["loss"] == pytest.approx(result.best["loss"], abs=1e-9)
    assert dense["params"] == pytest.approx(result.best["params"] * (stack.k * np.log(8) + 1), rel=1e-6)
    assert dense["memory_gib"] > 6


def test_training_costs_p_times_or_two_percent_of_it(stack: Law) -> None:
    rows = {row["streams"]: row for row in plan("6GiB", law=stack, dtypes=("bf16",), samples=20).frontier}
    one, eight = rows[1], rows[8]
    assert one["train_flops"] == pytest.approx(6 * 42e9 * (one["params"] + 151936 * one["hidden"]), rel=1e-9)
    assert 6.5 < eight["train_flops"] / one["train_flops"] < 8
    assert eight["two_stage_flops"] / one["train_flops"] == pytest.approx(1.12, abs=0.03)


def test_shared_keys_leave_room_for_a_larger_model_where_the_cache_is_large(stack: Law) -> None:
    rows = {}
    for kv in ("own", "shared"):
        work = Workload(batch=16, input=4096, accounting="counted", kv=kv)
        found = plan("16GiB", None, "a100-80g", stack, dtypes=("bf16",), workload=work, samples=20)
        rows[kv] = {row["streams"]: row for row in found.frontier}
    for p in (2, 4, 8):
        assert rows["shared"][p]["params"] > 1.05 * rows["own"][p]["params"]
        seconds_a_parameter = {kv: rows[kv][p]["prefill_s"] / rows[kv][p]["params"] for kv in rows}
        assert seconds_a_parameter["shared"] < 0.7 * seconds_a_parameter["own"]
    assert rows["shared"][1] == rows["own"][1]


def test_intervals_come_from_the_fit(stack: Law) -> None:
    best = plan("6GiB", law=stack, samples=40).best
    assert best["loss_low"] < best["loss"] < best["loss_high"]
    assert "refits" not in best


def test_a_law_that_knows_tokens_spends_the_training_budget_well(tmp_path: Path) -> None:
    """Chinchilla's question with streams: the optimum is inside, and no N on a grid with its tokens is better."""
    rows = [
        f"{n},{p},{d},{0.7 + (0.02 / (n / 1e9 * (1 + 0.4 * np.log(p)))) ** 0.25 + (0.5 / (d / 1e9)) ** 0.3}"
        for n in (3e8, 6e8, 1e9, 2e9)
        for p in (1, 4)
        for d in (1e10, 3e10, 1e11)
    ]
    path = tmp_path / "runs.csv"
    path.write_text("params,streams,tokens,loss\n" + "\n".join(rows))
    result = plan(law=path, train_flops=1e20, streams=(1,), samples=20)
    best = result.best
    assert best["train_flops"] == pytest.approx(1e20)
    shape = formulas.family(formulas.family_hidden(best["backbone_params"] * 2))
    tokens = 1e20 / formulas.train_flops(shape, 1, 1.0)
    assert fit(path, "data").predict(best["params"] * 2, 1, tokens) > best["loss"]
    assert best["backbone_params"] < 3e9


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (
            {"memory": "10MB"},
            r"nothing fits .* the smallest model considered \(27M parameters, P=1, int4\) needs 0\.0\d+ GiB",
        ),
        ({"latency": "1us"}, r"needs .* ms a token"),
        ({"train_flops": 1e10}, r"training FLOP"),
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"latency": "-4ms"}, "latency is '-4ms'"),
        ({"hardware": "tpu"}, "choose one of a100-80g"),
        ({"law": "/no/such.csv"}, "does not exist"),
        ({"streams": (0,)}, "streams is"),
        ({"dtypes": ("int3",)}, "dtype 'int3'"),
        ({"tokens": -1}, "tokens is -1"),
    ],
)
def test_bad_or_impossible_plans_say_why_in_one_line(budget: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        plan(**budget)
    assert "\n" not in str(caught.value)


def test_the_public_face_fits_predicts_and_plans(tmp_path: Path) -> None:
    """What the README and the design show, by the names that a user types."""
    law = parscale.law.fit(parscale.law.paper("stack"))
    assert (law.E, law.A, law.alpha, law.k) == pytest.approx((0.6912, 0.01131, 0.1894, 0.3935), rel=1e-3)
    assert law.predict(1_595_669_000, 8) == pytest.approx(1.0383, abs=0.004)
    path = tmp_path / "runs.csv"
    rows = [
        ",".join(f"{row[name]:.17g}" for name in ("params", "streams", "loss")) for row in parscale.law.paper("stack")
    ]
    path.write_text("params,streams,loss\n" + "\n".join(rows))
    assert parscale.law.fit(path).coefficients == law.coefficients
    chosen = parscale.law.plan(memory="6GiB", latency="40ms", hardware="l4", law=law, samples=20)
    assert isinstance(chosen, parscale.law.Plan)
    assert chosen.best["memory_gib"] <= 6
    assert chosen.best == plan("6GiB", "40ms", "l4", law, samples=20).best


def test_units() -> None:
    assert [parse_bytes(x) for x in ("6GiB", "6 gb", 12, "800MB")] == [6 * 2**30, 6e9, 12, 800e6]
    assert [parse_seconds(x) for x in ("40ms", "2s", 0.5, "7us")] == pytest.approx([0.04, 2, 0.5, 7e-6])
    for parse, text in ((parse_bytes, "6"), (parse_seconds, "40"), (parse_bytes, "6 ms")):
        with pytest.raises(InputError, match="a positive amount such as"):
            parse(text)


def test_the_verbs_print_tables_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--memory", "6GiB", "--latency", "40ms", "--hardware", "l4"]
    assert main([*asked, "--plot", str(tmp_path / "plan.png")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Take N =")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert main([*asked, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sentence"] in text
    assert {"params", "streams", "dtype", "loss", "memory_gib", "token_latency_s"} <= set(printed["best"])
    assert main(["plan", "--memory", "1MB"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("parscale: nothing fits")
    assert error.count("\n") == 1
    assert (
        main(
            [
                "cost",
                "--model",
                "0.5B",
                "--streams",
                "1",
                "8",
                "--batch",
                "1",
                "2",
                "--in",
                "32",
                "--out",
                "8",
                "--json",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [(r["streams"], r["batch"], r["in"], r["out"]) for r in rows] == [
        (1, 1, 32, 8),
        (1, 2, 32, 8),
        (8, 1, 32, 8),
        (8, 2, 32, 8),
    ]
    assert main(["cost", "--model", "0.5B"]) == 0
    assert "decode_step" in capsys.readouterr().out


def test_the_frontier_is_drawn_for_every_p(tmp_path: Path, stack: Law) -> None:
    asked = {"memory": "6GiB", "latency": None, "hardware": "l4", "law": "stack", "streams": (1, 8)}
    result = plan(**asked, dtypes=("bf16",), samples=20)
    path = draw_frontier(tmp_path / "f.svg", result, asked | {"workload": None, "train_flops": None})
    text = path.read_text()
    assert "P = 1" in text or text.count("<path") > 10
