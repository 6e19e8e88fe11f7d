"""Which N and P: the least loss that a memory, latency and training budget allow, and how sure the law is of it.

Models are the paper's family of shapes at any width (formulas.family). For each P and dtype cost grows with N and loss
falls, so the best N is the largest that fits; only a law with a data term under --train-flops has an inner optimum.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parscale.cost import formulas
from parscale.cost.hardware import Hardware, hardware_of
from parscale.cost.model import DTYPES, GIB, Workload
from parscale.errors import InputError
from parscale.law.equivalence import equivalent_params
from parscale.law.fit import Law, bootstrap_thetas, law_of
from parscale.law.units import parse_bytes, parse_seconds

PAPER_TOKENS = 42e9
"""Training tokens behind each of the paper's losses (section 3): what its law, which has no data term, holds for."""
SECOND_STAGE = 0.02
STREAMS = (1, 2, 4, 8)
PLAN_DTYPES = ("bf16", "int8", "int4")
_BELOW, _ABOVE = 20.0, 4.0  # how far from the runs' sizes a model is still considered


@dataclass(frozen=True)
class Budgets:
    """What may be spent. `memory`: bytes. `latency`: seconds an output token. `train_flops`: FLOP, None for any."""

    memory: float
    latency: float
    train_flops: float | None


@dataclass(frozen=True)
class Plan:
    """`best`: the row to take. `dense`: the best row with P = 1. `equal_dense`: what a dense model of the best row's
    loss would cost, budgets or not (None when the best is dense). `frontier`: the best row of every P and dtype, least
    loss first. `streams_win`: share of the law's refits in which the best P > 1 beats the best P = 1. `by_batch`: the
    best P under the same budgets at other batches. `sentence`: the advice."""

    best: dict[str, Any]
    dense: dict[str, Any] | None
    equal_dense: dict[str, Any] | None
    frontier: list[dict[str, Any]]
    streams_win: float
    by_batch: list[dict[str, Any]]
    sentence: str


@dataclass(frozen=True)
class Search:
    """Everything that is the same for every candidate."""

    law: Law
    work: Workload
    machine: Hardware
    budgets: Budgets
    tokens: float

    def row(self, params: float, streams: int, dtype: str) -> dict[str, Any]:
        """Cost, training cost and loss of the family's model with `params` backbone parameters."""
        shape = formulas.family(formulas.family_hidden(params))
        work = replace(self.work, streams=streams, dtype=dtype)
        terms = work.terms()
        seconds = formulas.latency(shape, terms, work.machine(self.machine))
        n = formulas.total_params(shape, streams, work.prefix_tokens)
        tokens = self._tokens(shape, streams)
        priced = tokens if self.law.form.needs_tokens else None
        return {
            "params": n,
            "streams": streams,
            "dtype": dtype,
            "loss": self.law.predict(n, streams, priced),
            "memory_gib": formulas.memory(shape, terms)["total"] / GIB,
            "token_latency_s": seconds["decode_step"],
            "prefill_s": seconds["prefill"],
            "latency_s": seconds["total"],
            "tokens": tokens,
            "train_flops": formulas.train_flops(shape, streams, tokens),
            "two_stage_flops": formulas.two_stage_flops(shape, streams, tokens, SECOND_STAGE),
            "hidden": shape["hidden"],
            "backbone_params": params,
            "extrapolated": not self.law.runs.surround(n, streams, priced),
        }

    def fits(self, params: float, streams: int, dtype: str) -> bool:
        """Whether the model with `params` backbone parameters is within every budget; rows say what it costs."""
        shape = formulas.family(formulas.family_hidden(params))
        work = replace(self.work, streams=streams, dtype=dtype)
        terms, limit = work.terms(), self.budgets.train_flops
        trained = formulas.train_flops(shape, streams, self._tokens(shape, streams))
        return (
            formulas.memory(shape, terms)["total"] <= self.budgets.memory
            and formulas.latency(shape, terms, work.machine(self.machine))["decode_step"] <= self.budgets.latency
            and (limit is None or trained <= limit * (1 + 1e-9))
        )

    def best_of(self, streams: int, dtype: str) -> dict[str, Any] | None:
        """The row of least loss that fits, None when even the smallest model does not."""
        low, high = self.range()
        if not self.fits(low, streams, dtype):
            return None
        largest = _largest(lambda n: self.fits(n, streams, dtype), low, high)
        if self._tokens_follow_size():
            sizes = np.geomspace(low, largest, 120)
            return min((self.row(n, streams, dtype) for n in sizes), key=lambda row: row["loss"])
        return self.row(largest, streams, dtype)

    def range(self) -> tuple[float, float]:
        sizes = self.law.runs.params
        return float(sizes.min() / _BELOW), float(sizes.max() * _ABOVE)

    def _tokens_follow_size(self) -> bool:
        return self.law.form.needs_tokens and self.budgets.train_flops is not None

    def _tokens(self, shape: dict[str, Any], streams: int) -> float:
        """Tokens trained on: as asked, or, when the law knows what tokens are worth, all that the budget pays for."""
        if self._tokens_follow_size() and self.budgets.train_flops is not None:
            return self.budgets.train_flops / formulas.train_flops(shape, streams, 1.0)
        return self.tokens


def plan(
    memory: str | float | None = None,
    latency: str | float | None = None,
    hardware: str | Path | Hardware = "a100-80g",
    law: str | Path | Law = "stack",
    streams: Iterable[int] = STREAMS,
    dtypes: Iterable[str] = PLAN_DTYPES,
    workload: Workload | None = None,
    train_flops: float | None = None,
    tokens: float | None = None,
    samples: int = 50,
) -> Plan:
    """The best N, P and dtype under the budgets.

    `memory`: "6GiB" or bytes; by default the hardware's. `latency`: "40ms" or seconds, an output token; by default any.
    `law`: "stack", "pile", a CSV of runs or a fitted Law. `workload`: batch, lengths, accounting (its streams and dtype
    are not used). `train_flops`: budget of training FLOP with streams from the first token. `tokens`: trained on; by
    default 42e9, as in the paper, or the median of the runs'. `samples`: refits behind the intervals.
    Raises InputError when nothing fits, naming the smallest model and what it needs.
    """
    machine = hardware_of(hardware)
    chosen, kinds = sorted(set(streams)), list(dict.fromkeys(dtypes))
    _check(chosen, kinds, train_flops, tokens)
    fitted = law if isinstance(law, Law) else law_of(law)
    budgets = Budgets(
        machine.memory if memory is None else parse_bytes(memory),
        float("inf") if latency is None else parse_seconds(latency),
        train_flops,
    )
    search = Search(fitted, workload or Workload(), machine, budgets, tokens or _usual_tokens(fitted))
    rows = [row for p in chosen for dtype in kinds if (row := search.best_of(p, dtype)) is not None]
    if not rows:
        raise InputError(_nothing_fits(search, chosen, kinds))
    frontier = _with_intervals(search, sorted(rows, key=lambda row: row["loss"]), samples)
    best = frontier[0]
    dense = next((row for row in frontier if row["streams"] == 1), None)
    streamed = next((row for row in frontier if row["streams"] > 1), None)
    share = _share(streamed, dense)
    by_batch = _by_batch(search, chosen, kinds)
    for row in frontier:
        del row["refits"]
    equal = _equal_dense(search, best) if best["streams"] > 1 else None
    return Plan(best, dense, equal, frontier, share, by_batch, _advice(search, best, dense, streamed, share, by_batch))


def frontier_curves(search: Search, streams: Iterable[int], dtype: str, points: int = 14) -> dict[int, list[tuple]]:
    """For each P, (memory budget in GiB, least loss) under the search's other budgets: the frontier's plot."""
    low = formulas.memory(formulas.family(formulas.family_hidden(search.range()[0])), search.work.terms())["total"]
    curves: dict[int, list[tuple]] = {}
    for p in streams:
        for memory in np.geomspace(low, max(4 * search.budgets.memory, 8 * low), points):
            row = replace(search, budgets=replace(search.budgets, memory=memory)).best_of(p, dtype)
            if row is not None:
                curves.setdefault(p, []).append((memory / GIB, row["loss"]))
    return curves


def _check(streams: list[int], dtypes: list[str], train_flops: float | None, tokens: float | None) -> None:
    if not streams or streams[0] < 1:
        raise InputError(f"streams is {streams!r}: one or more integers of at least 1 are needed")
    if not dtypes:
        raise InputError(f"dtype is empty: choose among {', '.join(DTYPES)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not known: choose among {', '.join(DTYPES)}")
    for name, value in (("train_flops", train_flops), ("tokens", tokens)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value!r}: a positive number is needed")


def _usual_tokens(law: Law) -> float:
    return PAPER_TOKENS if law.runs.tokens is None else float(np.median(law.runs.tokens))


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest N in [low, high] that fits, to 1e-6 of N; `low` is known to."""
    if fits(high):
        return high
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_intervals(search: Search, rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """Rows with `loss_low` and `loss_high`, the 95 % interval of the prediction, and the refits behind it."""
    thetas = bootstrap_thetas(search.law, samples)
    with_tokens = search.law.form.needs_tokens
    for row in rows:
        given = (row["params"], row["streams"], row["tokens"] if with_tokens else None)
        row["refits"] = np.array([replace(search.law, theta=theta).predict(*given) for theta in thetas])
        row["loss_low"], row["loss_high"] = (float(x) for x in np.percentile(row["refits"], [2.5, 97.5]))
    return rows


def _share(streamed: dict[str, Any] | None, dense: dict[str, Any] | None) -> float:
    if streamed is None or dense is None:
        return float(streamed is not None)
    return float((streamed["refits"] < dense["refits"]).mean())


def _by_batch(search: Search, streams: list[int], dtypes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 2, 4, 8, 16, 32):
        at = replace(search, work=replace(search.work, batch=batch))
        fitting = [row for p in streams for dtype in dtypes if (row := at.best_of(p, dtype)) is not None]
        if fitting:
            best = min(fitting, key=lambda row: row["loss"])
            rows.append({"batch": batch} | {name: best[name] for name in ("params", "streams", "dtype", "loss")})
    return rows


def _equal_dense(search: Search, best: dict[str, Any]) -> dict[str, Any]:
    tokens = best["tokens"] if search.law.form.needs_tokens else None
    fixed = replace(search, tokens=best["tokens"], budgets=replace(search.budgets, train_flops=None))
    return fixed.row(equivalent_params(search.law, best["params"], best["streams"], tokens), 1, best["dtype"])


def _nothing_fits(search: Search, streams: list[int], dtypes: list[str]) -> str:
    """What the smallest model of all needs: least memory first, as memory is the budget that cannot be waited out."""
    candidates = [search.row(search.range()[0], p, dtype) for p in streams for dtype in dtypes]
    least = min(candidates, key=lambda row: (row["memory_gib"], row["token_latency_s"]))
    needs = f"{least['memory_gib']:.3g} GiB and {1e3 * least['token_latency_s']:.3g} ms a token"
    asked = f"memory {search.budgets.memory / GIB:.3g} GiB"
    if np.isfinite(search.budgets.latency):
        asked += f", latency {1e3 * search.budgets.latency:.3g} ms a token"
    if search.budgets.train_flops is not None:
        asked += f", {search.budgets.train_flops:.2g} training FLOP"
        needs += f" and {least['train_flops']:.2g} training FLOP"
    return (
        f"nothing fits {asked} on {search.machine.name}: the smallest model considered ({least['params'] / 1e6:.0f}M "
        f"parameters, P={least['streams']}, {least['dtype']}) needs {needs}"
    )


def _advice(
    search: Search,
    best: dict[str, Any],
    dense: dict[str, Any] | None,
    streamed: dict[str, Any] | None,
    share: float,
    by_batch: list[dict[str, Any]],
) -> str:
    said = (
        f"Take N = {best['params'] / 1e9:.2f} B, P = {best['streams']}, {best['dtype']}: loss {best['loss']:.4f} nats"
    )
    said += f" ({best['loss_low']:.4f} to {best['loss_high']:.4f})."
    if dense is None:
        said += " P = 1 was not among the choices, or does not fit."
    elif best["streams"] == 1 and streamed is None:
        said += " P = 1 is the answer: no P > 1 was among the choices, or none fits."
    elif best["streams"] == 1 and streamed is not None:
        said += f" P = 1 is the better answer here: P = {streamed['streams']} would reach {streamed['loss']:.4f}."
    else:
        said += f" P = 1 would reach {dense['loss']:.4f}; streams win in {100 * share:.0f} % of the law's refits."
    dense_from = next(
        (row["batch"] for row in by_batch if row["streams"] == 1 and row["batch"] > search.work.batch), None
    )
    if best["streams"] > 1 and dense_from is not None:
        said += f" From batch {dense_from} on, P = 1 is the better answer under the same budgets."
    if best["extrapolated"]:
        said += " This is outside the sizes, P or tokens that the law was fitted to."
    if best["dtype"] in ("int8", "int4"):
        said += f" The law is about 16-bit weights: what {best['dtype']} costs in loss comes on top."
    return said
