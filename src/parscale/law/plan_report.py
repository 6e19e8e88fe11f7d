"""What `parscale plan` prints and draws: the advice, the frontier and its plot, or JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from parscale.cost.hardware import hardware_of
from parscale.cost.model import Workload
from parscale.law.fit import law_of
from parscale.law.planner import Budgets, Plan, Search, frontier_curves, plan
from parscale.law.units import parse_bytes, parse_seconds
from parscale.output import print_json, print_table

COLUMNS = ("params", "streams", "dtype", "loss", "loss_low", "loss_high", "memory_gib", "token_latency_s", "prefill_s")
OF_OWN_KEYS = (
    "The law is of streams with keys and values of their own. Shared ones cost what is told here, and keep a part of "
    "the gain: docs/shared-kv.md"
)
TRAINING = ("tokens", "train_flops", "two_stage_flops")


def report_plan(as_json: bool, plot: Path | None, **asked: Any) -> None:
    """Plan as asked (the arguments of `plan`), print it, and draw the frontier to `plot` if there is one."""
    result = plan(**asked)
    if plot is not None:
        draw_frontier(plot, result, asked)
    if as_json:
        print_json(asdict(result))
        return
    print(result.sentence)
    workload = asked["workload"]
    if workload is not None and workload.kv == "shared":
        print(OF_OWN_KEYS)
    print()
    columns = (*COLUMNS, *TRAINING, "extrapolated")
    print_table(
        "best of every P and dtype; 95 % intervals of the loss", [_only(row, columns) for row in result.frontier]
    )
    if result.equal_dense is not None:
        row = _only(result.equal_dense, ("params", "dtype", "loss", "memory_gib", "token_latency_s", "train_flops"))
        print_table("the dense model of the same loss, whatever the budgets", [row])
    print_table("the best P under the same budgets at other batches", result.by_batch)
    if plot is not None:
        print(f"plot: {plot}")


def draw_frontier(path: str | Path, result: Plan, asked: dict[str, Any]) -> Path:
    """Least loss against the memory budget for each P, at the best row's dtype and the other budgets as asked."""
    from matplotlib.figure import Figure

    from parscale.law.plot import save_figure

    machine, best = hardware_of(asked["hardware"]), result.best
    memory = machine.memory if asked["memory"] is None else parse_bytes(asked["memory"])
    latency = float("inf") if asked["latency"] is None else parse_seconds(asked["latency"])
    budgets = Budgets(memory, latency, asked["train_flops"])
    search = Search(law_of(asked["law"]), asked["workload"] or Workload(), machine, budgets, best["tokens"])
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for p, points in frontier_curves(search, asked["streams"], best["dtype"]).items():
        axes.plot(*zip(*points), "o-", markersize=3, label=f"P = {p}")
    axes.axvline(memory / 2**30, color="0.6", linewidth=0.8)
    axes.plot(best["memory_gib"], best["loss"], "k*", markersize=12, label="the plan")
    axes.set(xscale="log", xlabel="memory budget, GiB", ylabel="least loss, nats a token")
    axes.set_title(f"{machine.name}, {best['dtype']}, batch {search.work.batch}")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def _only(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in columns}
